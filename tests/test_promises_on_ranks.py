"""What every technique promises on two ranks: a file of its own, which one of several workers takes as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.compare import differences
from support.ranks import RankPair
from support.registry import REGISTRY
from support.small import BATCH, SAMPLES

EPOCH = SAMPLES // BATCH  # optimizer steps


@pytest.mark.parametrize("entry", list(REGISTRY))
def test_ranks_agree_and_resume(entry: str, rank_pair: RankPair, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, second = rank_pair.run("support.jobs:fit_on_ranks", tmp_path, entry=entry, folder=str(folder))
    second["weights"] |= {key: first["weights"][key] for key in first["weights"] if "running" in key}  # each rank's own
    for part in ("weights", "optimizers"):
        assert differences(first[part], second[part]) == []
    for mine, other in zip(first["techniques"], second["techniques"], strict=True):
        for part in ("keep", "codebooks", "indices", "weights", "inputs", "generator", "regressors"):
            assert differences(mine.get(part), other.get(part)) == []

    resume = str(folder / f"step={2 * EPOCH // 2}.ckpt")
    # A save brings the ranks' sums together, in floating point, so both runs must save at the same steps.
    options = {"entry": entry, "resume": resume, "folder": str(tmp_path / "again")}
    again = rank_pair.run("support.jobs:fit_on_ranks", tmp_path, **options)
    assert differences([first, second], again) == []
