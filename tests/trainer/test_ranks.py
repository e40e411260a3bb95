"""What holds on two ranks beyond the promises of every technique."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from support.ranks import RankPair
from support.small import SAMPLES, SmallModule, dataset, plain, quiet_trainer, shuffled
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_compress import IterativePruningCallback
from lightning_compress.core.distributed import all_reduce_sum, broadcast, gather, rank


def collectives() -> dict[str, Any]:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mine = rank()
    return {
        "sum": all_reduce_sum(torch.tensor([1.0, float(mine)])),
        "float": broadcast(torch.tensor([mine + 0.5])),
        "mask": broadcast(torch.tensor([mine == 0, mine == 1])),
        "all": gather(f"rank {mine}"),
    }


def test_collectives(rank_pair: RankPair, tmp_path: Path) -> None:
    for result in rank_pair.run("trainer.test_ranks:collectives", tmp_path):
        assert result["sum"].tolist() == [2.0, 1.0]
        assert result["float"].tolist() == [0.5]
        assert result["mask"].tolist() == [True, False]
        assert result["all"] == ["rank 0", "rank 1"]


def synchronized_batch_norm() -> dict[str, Any]:
    seed_everything(1, verbose=False)
    module = SmallModule()
    callback = IterativePruningCallback(0.5, granularity="neuron", end_epoch=1.0)
    trainer = quiet_trainer(strategy="ddp", devices=2, sync_batchnorm=True, callbacks=[callback], max_epochs=1)
    try:
        trainer.fit(module, shuffled(), plain())
    except ValueError as error:
        return {"error": str(error)}
    return {"module": type(module.net.norm).__name__}


def test_synchronized_batch_norm_is_lightnings_to_refuse_on_a_cpu(rank_pair: RankPair, tmp_path: Path) -> None:
    for result in rank_pair.run("trainer.test_ranks:synchronized_batch_norm", tmp_path):
        assert "SyncBatchNorm" in result.get("error", "") + result.get("module", "")


def fit_with(criterion: str, options: dict[str, Any], **settings: Any) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    module = SmallModule()
    callback = IterativePruningCallback(0.5, criterion=criterion, end_epoch=1.0, every_n_steps=3, **settings)
    trainer = quiet_trainer(strategy=DDPStrategy(**options), devices=2, callbacks=[callback], max_epochs=1)
    try:
        trainer.fit(module, shuffled(), plain())
    except ValueError as error:
        return {"error": str(error), "step": trainer.global_step}
    return {name: value.clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize(
    ("criterion", "options", "settings", "message"),
    [
        ("fisher", {"static_graph": True}, {}, "runs a second backward pass in every step"),
        ("obd", {"static_graph": True}, {}, "runs a second backward pass in every step"),
        (
            "taylor",
            {"static_graph": True},
            {"granularity": "neuron", "shrink": "during_fit"},
            "changes the network's shapes during the fit, but DDPStrategy(static_graph=True) keeps",
        ),
        ("magnitude", {"model_averaging_period": 2}, {}, "needs equal weights on all ranks after every step"),
        ("magnitude", {"mixed_precision": None}, {}, "is not tested with DDPStrategy(mixed_precision=...)"),
    ],
)
def test_options_that_let_ranks_train_apart_are_refused(
    criterion: str, options: Any, settings: Any, message: str, rank_pair: RankPair, tmp_path: Path
) -> None:
    job = {"criterion": criterion, "options": options} | settings
    for result in rank_pair.run("trainer.test_ranks:fit_with", tmp_path, **job):
        assert message in result["error"]
        assert result["step"] == 0


@pytest.mark.parametrize("criterion", ["taylor", "ewc", "mas"])
def test_a_static_graph_goes_with_what_leaves_the_loss_alone(
    criterion: str, rank_pair: RankPair, tmp_path: Path
) -> None:
    options = {"static_graph": True, "gradient_as_bucket_view": True}
    first, second = rank_pair.run("trainer.test_ranks:fit_with", tmp_path, criterion=criterion, options=options)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# ---------------------------------------------------------------------- two ranks see what one process sees


class Plain(LightningModule):
    """Nothing random, and nothing that depends on the other samples of a batch; in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3)).double()
        self.example_input_array = torch.zeros(2, 12, dtype=torch.double)
        self.poisoned_step: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0].double()), batch[1])
        poisoned = batch_idx == self.poisoned_step and self.global_rank == 1
        return loss * torch.nan if poisoned else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not all(bool(parameter.grad.isfinite().all()) for parameter in self.parameters()):
            optimizer.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


WATCHING = [("fisher", "weight"), ("mas", "weight"), ("taylor", "weight"), ("si", "weight")]
WATCHING += [("taylor", "neuron"), ("mean_activation", "neuron"), ("apoz", "neuron"), ("fisher", "neuron")]


def fit_plain(criterion: str, granularity: str, poisoned_step: int | None = None, **trainer: Any) -> dict[str, Tensor]:
    """Rank r of 2 gets every second sample: with twice the batch size, one process gets the same batches."""
    seed_everything(1, verbose=False)
    module = Plain()
    module.poisoned_step = poisoned_step
    callback = IterativePruningCallback(
        0.5,
        criterion=criterion,
        granularity=granularity,
        start_epoch=0.5,
        end_epoch=2.0,
        every_n_steps=4,
        shrink="never",
    )
    loader = DataLoader(dataset(), batch_size=8)
    if "devices" in trainer:
        loader = DataLoader(Subset(dataset(), range(int(os.environ["RANK"]), SAMPLES, 2)), batch_size=4)
    quiet_trainer(callbacks=[callback], max_epochs=3, use_distributed_sampler=False, **trainer).fit(module, loader)
    return {name: value.clone() for name, value in module.named_parameters()}


def fit_all(**options: Any) -> list[dict[str, Tensor]]:
    return [fit_plain(*one, strategy="ddp", devices=2, **options) for one in WATCHING]


def test_two_ranks_prune_what_one_process_prunes_with_their_data(rank_pair: RankPair, tmp_path: Path) -> None:
    first, second = rank_pair.run("trainer.test_ranks:fit_all", tmp_path)
    for one, mine, other in zip(WATCHING, first, second, strict=True):
        for name, expected in fit_plain(*one).items():
            assert torch.equal(mine[name], other[name])
            assert torch.equal(mine[name] == 0, expected == 0), (one, name)
            torch.testing.assert_close(mine[name], expected, rtol=1e-9, atol=1e-12)


def test_a_batch_of_one_rank_that_is_not_finite_poisons_neither(rank_pair: RankPair, tmp_path: Path) -> None:
    first, second = rank_pair.run("trainer.test_ranks:fit_all", tmp_path, poisoned_step=7)
    for mine, other in zip(first, second, strict=True):
        for name, value in mine.items():
            assert bool(value.isfinite().all())
            assert torch.equal(value, other[name])


class AsTheRankLikes(SmallModule):
    """The second rank's channels meet those of another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(12, 6)
        self.first, self.last = nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(F.relu(hidden + self.beside(x) if rank() else hidden))


def fit_as_the_rank_likes() -> str:
    pruning = IterativePruningCallback(0.5, granularity="neuron", shrink="never")
    try:
        quiet_trainer(callbacks=[pruning], strategy="ddp", devices=2).fit(AsTheRankLikes(), plain())
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_find_different_channels_are_told_so(rank_pair: RankPair, tmp_path: Path) -> None:
    for said in rank_pair.run("trainer.test_ranks:fit_as_the_rank_likes", tmp_path):
        assert "Ranks 0 and 1 found different channels" in said
        assert "Pass example_inputs" in said


class BreaksOnARank(SmallModule):
    """On one rank no layer has channels that may be pruned, or the forward does not run."""

    def __init__(self, how: str, where: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 6), nn.Linear(6, 3)
        self.how, self.where = how, where

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if rank() == self.where and self.how == "nothing":
            return torch.cat([hidden, hidden], 1).softmax(1)[:, :3]
        if rank() == self.where and self.how == "crash":
            raise RuntimeError("no such index")
        return self.last(F.relu(hidden))


def fit_where_one_rank_fails(how: str, where: int) -> str:
    pruning = IterativePruningCallback(0.5, granularity="neuron", shrink="never", target=["first"])
    try:
        quiet_trainer(callbacks=[pruning], strategy="ddp", devices=2).fit(BreaksOnARank(how, where), plain())
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(("how", "error"), [("nothing", "No targeted layer has channels"), ("crash", "no such index")])
def test_where_one_rank_fails_to_find_channels_all_of_them_say_so(
    how: str, error: str, where: int, rank_pair: RankPair, tmp_path: Path
) -> None:
    said = rank_pair.run("trainer.test_ranks:fit_where_one_rank_fails", tmp_path, how=how, where=where)
    assert all(error in one for one in said)
    assert said[1 - where] == f"Rank {where}: {said[where]}"
