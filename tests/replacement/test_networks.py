"""Networks of the transformers package and convolutional ones: what is replaced resumes, exports and reloads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from support.compare import differences
from support.small import quiet_trainer
from support.zoo import ZOO
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_compress import ConvSubstitutionCallback, LowRankCallback, load_compressed, save_compressed
from lightning_compress.core.evaluation import caches_off, evaluating
from lightning_compress.core.example_inputs import call
from lightning_compress.low_rank.merge import merge
from lightning_compress.replacement.find import plainly
from lightning_compress.replacement.swap import replaced

STEPS = 3
LOW_RANK = ["vit", "bert", "gpt2", "llama", "swin", "convnext", "regnet", "mobilenet", "unet"]
SETTINGS = [(name, "low rank") for name in LOW_RANK] + [("resnet", "separable"), ("unet", "ghost"), ("resnet", "fire")]


class Learner(LightningModule):
    """Trains any network to return zeros, from batches that are its inputs."""

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = ZOO[name].make().train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum((one.float() ** 2).mean() for one in answers(self.net, batch))  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def answers(net: nn.Module, inputs: Any) -> list[Tensor]:
    with caches_off(net):
        return [one for one in tree_leaves(call(net, inputs)) if isinstance(one, Tensor) and one.is_floating_point()]


def run(net: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluating(net):
        return answers(net, inputs)


def loader(name: str) -> DataLoader:
    """The same few samples again and again, each as a tensor or a dict of tensors."""
    given = ZOO[name].inputs()
    samples = [
        {key: one[n % 2] for key, one in given.items()} if isinstance(given, dict) else given[n % 2]
        for n in range(2 * STEPS)
    ]
    return DataLoader(samples, batch_size=2)  # type: ignore[arg-type]


def fitted(name: str, kind: str, folder: Path, resume: Path | None = None) -> Learner:
    module = Learner(name, seed=1 if resume else 0)
    callback = (
        LowRankCallback(2, network="net", n_batches=2)
        if kind == "low rank"
        else ConvSubstitutionCallback(kind, network="net", n_batches=2)  # type: ignore[arg-type]
    )
    saved = [ModelCheckpoint(folder, filename="{step}", save_top_k=-1)] if resume is None else []
    trainer = quiet_trainer(callbacks=[callback, *saved], enable_checkpointing=bool(saved), max_epochs=2)
    torch.manual_seed(5 if resume is None else 6)
    trainer.fit(module, loader(name), ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize(("name", "kind"), SETTINGS, ids=[f"{name}, {kind}" for name, kind in SETTINGS])
def test_a_replaced_network_resumes_exports_and_reloads_into_its_dense_class(
    name: str, kind: str, tmp_path: Path
) -> None:
    module, inputs = fitted(name, kind, tmp_path), ZOO[name].inputs()
    net = module.net
    assert replaced(net)
    resumed = fitted(name, kind, tmp_path, resume=tmp_path / f"step={STEPS}.ckpt")
    assert not differences(module.state_dict(), resumed.state_dict())
    expected = run(net, inputs)

    save_compressed(net, tmp_path / "net.lcz")
    loaded = load_compressed(tmp_path / "net.lcz", ZOO[name].make())
    assert all(torch.equal(one, other) for one, other in zip(run(loaded, inputs), expected, strict=True))
    assert len(list(loaded.parameters())) == len(list(net.parameters()))  # what was tied is tied

    dense = ZOO[name].make()
    loaded.load_state_dict(dense.state_dict())
    assert not replaced(loaded)
    for one, other in zip(run(loaded, inputs), run(dense, inputs), strict=True):
        torch.testing.assert_close(one, other)

    other = copy.deepcopy(net)
    with plainly(other), caches_off(other):
        positional, keywords = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        program = torch.export.export(other, positional, keywords)
        found = [one for one in tree_leaves(program.module()(*positional, **keywords)) if one.is_floating_point()]
    for one, other_one in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "bert", "convnext", "mobilenet"])
def test_merged_layers_are_those_of_the_dense_class(name: str, tmp_path: Path) -> None:
    net, inputs = fitted(name, "low rank", tmp_path).net, ZOO[name].inputs()
    expected, dense = run(net, inputs), ZOO[name].make()
    dense.load_state_dict(merge(net).state_dict())
    for one, other in zip(run(dense, inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
