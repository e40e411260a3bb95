"""What holds on two ranks beyond the promises of every technique."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from support.ranks import RankPair
from support.small import SmallModule, plain, quiet_trainer, shuffled

from lightning_compress import IterativePruningCallback
from lightning_compress.trainer.distributed import all_reduce_sum, broadcast, gather, rank


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
        ("fisher", {"static_graph": True}, {}, "goes back from the loss once more"),
        ("obd", {"static_graph": True}, {}, "goes back from the loss once more"),
        (
            "taylor",
            {"static_graph": True},
            {"granularity": "neuron", "shrink": "during_fit"},
            "changes the network's shapes during the fit, which DDPStrategy(static_graph=...) does not survive",
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
