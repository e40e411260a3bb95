"""Widths on two ranks: gradients, random widths and statistics are those of one process with all samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from support.ranks import RankPair
from support.small import FEATURES, SmallModule, dataset, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import SlimmableWidth
from lightning_compress.slimmable.norms import norms_of

X = torch.zeros(2, FEATURES)


class Watched(SmallModule):
    """Keeps the gradients of each step; its batches don't depend on one another, unless it has its norm."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.net.dropout.p = 0.0
        self.found: list[dict[str, Tensor]] = []
        self.batches: list[Any] = []
        if not normed:
            self.net.norm = nn.Identity()  # type: ignore[assignment]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_after_backward(self) -> None:
        self.found.append({name: one.grad.clone() for name, one in self.named_parameters() if one.grad is not None})


def fitted(options: dict[str, Any], devices: int, normed: bool = False, batches: Any = None) -> dict[str, Any]:
    """Fit for three steps, with these batches, or with other samples on each rank."""
    seed_everything(1)
    module = Watched(normed)
    wrapped = SlimmableWidth(module, (0.25, 0.5), example_inputs=X, **options)
    seed_everything(5 + int(os.environ.get("RANK", "0")))
    drawn: list[list[float]] = []
    module.net.head.register_forward_hook(lambda *_: drawn.append(list(wrapped._objective()._drawn)))
    trainer = quiet_trainer(max_steps=3, devices=devices, strategy="ddp" if devices == 2 else "auto")
    loader: Any = DataLoader(dataset(0), batch_size=8)
    trainer.fit(wrapped, loader if batches is None else DataLoader(batches, batch_size=None))
    held = norms_of(wrapped)
    assert held is not None
    buffers = {name: one.clone() for name, one in held.named_buffers()}
    return {"gradients": module.found, "drawn": drawn, "norms": buffers, "batches": module.batches}


@pytest.mark.parametrize("options", [{"norms": "private"}, {"universal": True}])
def test_gradients_of_two_ranks_are_those_of_one_process(
    options: dict[str, Any], rank_pair: RankPair, tmp_path: Path
) -> None:
    first, second = rank_pair.run("slimmable.test_on_ranks:fitted", tmp_path, options=options, devices=2)
    pairs = zip(first["batches"], second["batches"], strict=True)
    alone = fitted(options, 1, batches=[[torch.cat(both) for both in zip(*pair, strict=True)] for pair in pairs])
    assert first["drawn"] == second["drawn"] == alone["drawn"]
    assert len({tuple(some) for some in first["drawn"]}) == (3 if "universal" in options else 1)
    for mine, other, joint in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        assert mine.keys() == joint.keys()
        for name, gradient in joint.items():
            assert torch.equal(mine[name], other[name])
            torch.testing.assert_close(mine[name], gradient, atol=1e-6, rtol=1e-4)


def test_statistics_that_are_computed_anew_are_those_of_all_ranks(rank_pair: RankPair, tmp_path: Path) -> None:
    job = {"options": {"norms": "recalibrate"}, "devices": 2, "normed": True}
    first, second = rank_pair.run("slimmable.test_on_ranks:fitted", tmp_path, **job)
    assert first["norms"].keys() == second["norms"].keys()
    for name, tensor in first["norms"].items():
        assert torch.equal(tensor, second["norms"][name]), name
        assert "tracked" in name or not torch.equal(tensor, torch.zeros_like(tensor))
