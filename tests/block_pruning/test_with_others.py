"""Blocks that leave in one fit, and what other techniques do before or after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from support.compare import differences
from support.residual import images, resnet, tokens, transformer
from support.small import FEATURES, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_compress import (
    BlockPruningCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
    load_compressed,
    prune_blocks,
    save_compressed,
)
from lightning_compress.block_pruning.stand_in import stand_ins
from lightning_compress.deploy import capture, save_onnx
from lightning_compress.quantization.input_grids import InputGrid, input_grids, quantize_inputs

OTHERS: dict[str, Callable[[], Callback]] = {
    "pruning": lambda: IterativePruningCallback(0.5, schedule="one_shot"),
    "neurons": lambda: IterativePruningCallback(0.5, granularity="neuron", schedule="one_shot", shrink="during_fit"),
    "clustering": lambda: WeightClusteringCallback(4),
    "quantization": lambda: QuantizationAwareTrainingCallback(8, 4),
}


def depth() -> BlockPruningCallback:
    return BlockPruningCallback(0.5, schedule="one_shot", n_batches=1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_fits_one_after_the_other_end_in_one_file(other: str, first: bool, tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    module = SmallModule(residual=True)
    for callback in (depth(), OTHERS[other]()) if first else (OTHERS[other](), depth()):
        quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, shuffled(), plain())
    (path,) = stand_ins(module)
    assert path in ("net.block1", "net.block2")
    if other == "quantization":
        assert sorted(input_grids(module)) == sorted(
            {"net.conv", "net.hidden", "net.head"}
            | {f"{one}.conv{n}" for one in {"net.block1", "net.block2"} - {path} for n in (1, 2)}
        )
    save_compressed(module, tmp_path / "file.lcz")
    loaded = load_compressed(tmp_path / "file.lcz", SmallModule(residual=True))
    x = torch.randn(4, FEATURES)
    assert differences(dict(module.state_dict()), dict(loaded.state_dict())) == []
    assert torch.equal(module.eval()(x), loaded.eval()(x))


def test_inputs_of_layers_that_have_left_are_quantized_no_more(tmp_path: Path) -> None:
    net, x = transformer(), tokens()
    quantize_inputs(net, {f"layers.0.{name}": InputGrid(0.01, 128, 8) for name in ("qkv", "out", "fc1", "fc2")})
    prune_blocks(net, x, remove=["layers.0:2"])  # the second block of layer 0
    assert sorted(input_grids(net)) == ["layers.0.out", "layers.0.qkv"]
    save_compressed(net, tmp_path / "file.lcz")
    loaded = load_compressed(tmp_path / "file.lcz", transformer(seed=4))
    assert torch.equal(loaded(x), net(x))


class Averaged(SmallModule):
    """Keeps a moving average of its network, with which it predicts."""

    def __init__(self) -> None:
        super().__init__(residual=True)
        self.average = AveragedModel(self.net, use_buffers=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.average.update_parameters(self.net)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.average(batch[0]).mean())


def test_an_average_that_the_module_holds_loses_the_blocks_too(tmp_path: Path) -> None:
    module = Averaged()
    quiet_trainer(callbacks=[BlockPruningCallback(0.5, n_batches=1, network="net")], max_epochs=2).fit(
        module, shuffled(), plain()
    )
    (path,) = (one for one in stand_ins(module) if one.startswith("net."))
    assert sorted(stand_ins(module)) == [f"average.module.{path.removeprefix('net.')}", path]
    save_compressed(module, tmp_path / "file.lcz")
    loaded = load_compressed(tmp_path / "file.lcz", Averaged())
    assert differences(dict(module.state_dict()), dict(loaded.state_dict())) == []


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_network_loses_blocks(how: str) -> None:
    net, plain_one, x = resnet(), resnet(), images()
    compiled: Any = net
    if how == "wrapped":
        compiled = torch.compile(net, backend="eager")
    else:
        net.compile(backend="eager")
    before = compiled(x)
    prune_blocks(compiled, x, remove=["*stages.0.1"])
    prune_blocks(plain_one, x, remove=["stages.0.1"])
    assert torch.equal(compiled(x), plain_one(x))
    assert not torch.equal(compiled(x), before)


def test_onnx_has_what_is_left(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = resnet(), images()
    prune_blocks(net, x, remove=["stages.0.1", "stages.1.0"])
    save_onnx(capture(net, x), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    some: Tensor = torch.randn(5, 3, 16, 16)  # another batch size
    (found,) = session.run(None, {session.get_inputs()[0].name: some.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(some).detach(), rtol=1e-4, atol=1e-4)


def test_a_copy_of_the_module_is_pruned_by_itself() -> None:
    module: LightningModule = SmallModule(residual=True)
    other = copy.deepcopy(module)
    quiet_trainer(callbacks=[depth()], max_epochs=1).fit(module, shuffled(), plain())
    again = copy.deepcopy(module)
    assert not stand_ins(other)
    assert list(stand_ins(again)) == list(stand_ins(module))
    again.load_state_dict(other.state_dict())
    assert not stand_ins(again)
    assert stand_ins(module)
