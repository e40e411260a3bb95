"""What holds on two ranks beyond the promises of every technique."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
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
