"""Replaced layers beside every other technique: one fit, an exact resume, a file, and an exported network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.compare import differences
from support.forms import Replacing, recorded_forms
from support.jobs import fit
from support.ranks import RankPair
from support.registry import (
    Entry,
    binary,
    block_gates,
    channel_gates,
    clustering,
    depth,
    distillation,
    exits,
    lasso,
    pruning,
    qat,
    widths,
)
from support.small import BATCH, FEATURES, SAMPLES, SmallModule
from torch import Tensor, nn

from lightning_compress import load_compressed, save_compressed
from lightning_compress.conv_substitution.blocks import Ghost, Separable
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.deploy import capture, save_onnx
from lightning_compress.quantization.input_grids import input_grids
from lightning_compress.replacement.plan import Plan, Replacement
from lightning_compress.replacement.swap import replaced
from lightning_compress.trainer.compatibility import IncompatibleError
from lightning_compress.trainer.replacing import ReplacingCallback
from lightning_compress.trainer.unwrap import innermost

EPOCH = SAMPLES // BATCH
RANKS = {"net.hidden": 6, "net.block1.conv1": 3}
BLOCKS = {"net.block1.conv2": (Separable, {"terms": 1}), "net.block2.conv1": (Ghost, {"ratio": 2})}


class Blocks(ReplacingCallback):
    """Replaces convolutions by blocks with random values."""

    kind = "conv_block"

    def __init__(self, network: str = "") -> None:
        super().__init__(network=network)
        self.network, self.example_inputs, self.n_batches = network, None, 0

    def plan(self, network: nn.Module, example_inputs: ExampleInputs, batches: Sequence[ExampleInputs]) -> Plan:
        return Plan({path: Replacement(form, numbers) for path, (form, numbers) in BLOCKS.items()})


@pytest.fixture(autouse=True)
def forms() -> Iterator[None]:
    with recorded_forms():
        yield


def module(seed: int = 0) -> SmallModule:
    torch.manual_seed(seed)
    return SmallModule(residual=True)


def both() -> list[ReplacingCallback]:
    return [Replacing(RANKS), Blocks()]


def answers(one: nn.Module) -> Tensor:
    x = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(5))
    own = innermost(one)  # type: ignore[arg-type]
    with evaluating(own):
        return own(x)


ENTRIES: Mapping[str, Callable[[], Entry]] = {
    "pruning": pruning,
    "neurons": partial(pruning, granularity="neuron", amount=0.5),
    "neurons during the fit": partial(pruning, granularity="neuron", amount=0.5, shrink="during_fit"),
    "group lasso": partial(lasso, granularity="group", proximal=True, strength=0.3, shrink="on_fit_end"),
    "clustering": clustering,
    "binary": partial(binary, mode="stochastic"),
    "quantization": partial(qat, 4, 8),
    "blocks leave": depth,
    "distillation": distillation,
    "exits": exits,
    "everything": lambda: pruning(amount=0.6).with_(
        clustering(start_epoch=1.0), qat(4, 8, granularity="tensor", start_epoch=2.0), distillation()
    ),
}


def fitted(entry: Entry, one: LightningModule, *, replace: bool = True, average: bool = False, **options: Any) -> Any:
    callbacks = [*([EMAWeightAveraging(decay=0.9)] if average else []), *(both() if replace else [])]
    return fit(
        None,
        module=entry.wrap(one),
        callbacks=(*callbacks, *entry.callbacks()),
        stateful=True,
        max_epochs=3,
        gradient_clip_val=1.0,
        **options,
    )


@pytest.mark.parametrize("name", ENTRIES)
def test_a_technique_works_on_what_has_replaced_layers(name: str, tmp_path: Path) -> None:
    entry, one = ENTRIES[name](), module()
    average = name in ("pruning", "clustering", "neurons", "quantization")
    whole = fitted(entry, one, folder=tmp_path, every_n_train_steps=17, average=average)
    left = {path for path in (*RANKS, *BLOCKS) if path in dict(one.named_modules())}
    assert set(replaced(one)) == left
    assert left == {*RANKS, *BLOCKS} or name == "blocks leave"
    resumed = module(3)
    assert not differences(whole, fitted(entry, resumed, average=average, resume=tmp_path / "step=17.ckpt"))
    acted_on_parts(name, one)

    wrapped = entry.wrap(module(4)) if name == "exits" else module(4)
    save_compressed(one, tmp_path / "module.lcz")
    loaded = load_compressed(tmp_path / "module.lcz", wrapped)
    assert torch.equal(answers(loaded), answers(one))
    exported(one, tmp_path, as_onnx=name in ("neurons", "everything"))


def acted_on_parts(name: str, one: SmallModule) -> None:
    """Check that the technique has changed the parts themselves."""
    first: Any = one.net.hidden.first
    if name in ("pruning", "everything"):
        assert int((first.weight == 0).sum()) > 0.3 * first.weight.numel()
    if name.startswith("neurons"):
        assert first.out_features < 6
    if name in ("clustering", "everything"):
        assert len(first.weight.unique()) <= 6
    if name == "binary":
        assert len(first.weight.abs().unique()) == 1
    if name == "quantization":
        assert max(len(row.unique()) for row in first.weight) <= 16


def exported(one: SmallModule, tmp_path: Path, *, as_onnx: bool) -> None:
    """Check what torch.export makes of the network, or ONNX, which takes longer and begins with it."""
    net, x = copy.deepcopy(one.net).eval(), torch.randn(3, FEATURES)
    with torch.no_grad():
        expected = net(x)
    if not as_onnx:
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
        return
    pytest.importorskip("onnxruntime")
    save_onnx(capture(net, x), tmp_path / "net.onnx", grids=input_grids(net))


@pytest.mark.parametrize(
    "name", ["pruning", "neurons", "clustering", "binary", "quantization", "distillation", "exits"]
)
def test_layers_are_replaced_after_an_earlier_fit_with_a_technique(name: str, tmp_path: Path) -> None:
    entry, one = ENTRIES[name](), module()
    fitted(entry, one, replace=False)
    wrapped = entry.wrap(one) if name == "exits" else one
    again = partial(fit, None, stateful=True, max_epochs=2, gradient_clip_val=1.0)
    whole = again(module=wrapped, callbacks=tuple(both()), folder=tmp_path, every_n_train_steps=7)
    assert set(replaced(one)) == {*RANKS, *BLOCKS}
    if name == "neurons":
        assert one.net.hidden.of.shape[1] < 6 * FEATURES
    save_compressed(one, tmp_path / "module.lcz")
    fresh = entry.wrap(module(4)) if name == "exits" else module(4)
    loaded = load_compressed(tmp_path / "module.lcz", fresh)
    assert torch.equal(answers(loaded), answers(one))
    if name in ("neurons", "quantization"):
        exported(one, tmp_path, as_onnx=name == "quantization")
    resumed = again(module=loaded, callbacks=tuple(both()), resume=tmp_path / "step=7.ckpt")
    assert not differences(whole, resumed)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [(widths, "widths"), (channel_gates, "gates"), (block_gates, "gates")],
    ids=["widths", "channel gates", "block gates"],
)
def test_what_has_chosen_layers_before_is_refused_and_nothing_changes(entry: Any, reason: str) -> None:
    one = module()
    wrapped = entry().wrap(one)
    keys = list(one.state_dict())
    with pytest.raises(IncompatibleError, match=r"replaces layers .* in an earlier fit"):
        fit(None, module=wrapped, callbacks=tuple(both()), max_epochs=1)
    assert not replaced(one)
    assert list(one.state_dict()) == keys
    assert reason


def fit_on_rank(name: str) -> dict[str, Any]:
    """A job of the pair of ranks."""
    with recorded_forms():
        return fitted(ENTRIES[name](), module(), average=name == "pruning", strategy="ddp", devices=2)


@pytest.mark.parametrize("name", ["pruning", "neurons during the fit", "quantization"])
def test_two_ranks_agree(name: str, rank_pair: RankPair, tmp_path: Path) -> None:
    first, second = rank_pair.run("replacement.test_with_others:fit_on_rank", tmp_path, name=name)
    assert not differences(first["weights"], second["weights"])
    assert any(".second." in one for one in first["weights"])


@pytest.mark.parametrize("entry", [widths, channel_gates, block_gates], ids=["widths", "channel gates", "block gates"])
def test_what_chooses_layers_wraps_a_network_with_replaced_layers(entry: Any, tmp_path: Path) -> None:
    one = module()
    fit(None, module=one, callbacks=tuple(both()), max_epochs=1)
    fit(None, module=entry().wrap(one), max_epochs=1, gradient_clip_val=1.0)
    assert set(replaced(one)) == {*RANKS, *BLOCKS}
    save_compressed(one, tmp_path / "module.lcz")
    loaded = load_compressed(tmp_path / "module.lcz", module(4))
    assert torch.equal(answers(loaded), answers(one))
    assert set(replaced(loaded)) == {*RANKS, *BLOCKS}
