"""State of another version of the package is refused with one error that says so, whatever it holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)
from lightning_compress.tasks.history import Recorder
from lightning_compress.trainer.resume import FORMAT
from tests.support.small import SmallModule, plain, quiet_trainer, shuffled

TECHNIQUES: dict[str, Callable[[], Callback]] = {
    "pruning": lambda: IterativePruningCallback(0.5),
    "fisher": lambda: IterativePruningCallback(0.5, criterion="fisher"),
    "lasso": lambda: GroupLassoCallback(0.01),
    "clustering": lambda: WeightClusteringCallback(4),
    "grid": lambda: QuantizationAwareTrainingCallback(4),
    "signs": lambda: BinaryWeightsCallback(),
}


@cache
def checkpoint(name: str) -> Path:
    path = Path(mkdtemp()) / "last.ckpt"
    trainer = quiet_trainer(callbacks=[TECHNIQUES[name]()], max_epochs=1)
    trainer.fit(SmallModule(), shuffled(), plain())
    trainer.save_checkpoint(path)
    return path


def resume(name: str, change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    content = torch.load(checkpoint(name), weights_only=True)
    (state,) = (value for key, value in content["callbacks"].items() if "technique" in value)
    change(state)
    torch.save(content, folder / "changed.ckpt")
    trainer = quiet_trainer(callbacks=[TECHNIQUES[name]()], max_epochs=2)
    trainer.fit(SmallModule(), shuffled(), plain(), ckpt_path=folder / "changed.ckpt", weights_only=True)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_format_is_written_and_others_are_refused_by_their_number(name: str, tmp_path: Path) -> None:
    resume(name, lambda state: None, tmp_path)
    with pytest.raises(ValueError, match=rf"state of \w+ has format 1, and this version .* reads format {FORMAT}\."):
        resume(name, lambda state: state.pop("format"), tmp_path)
    with pytest.raises(ValueError, match=r"has format 99, .*or start a new fit from its weights alone"):
        resume(name, lambda state: state.update(format=99), tmp_path)


@pytest.mark.parametrize("name", [name for name in TECHNIQUES if name != "lasso"])  # which keeps nothing
def test_a_state_that_lacks_a_part_is_refused_in_words(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was written by another version of lightning_compress"):
        resume(name, lambda state: state.update(technique={}), tmp_path)


def test_a_history_of_another_version_is_refused_in_words() -> None:
    for state in ({}, {"history": [{"epoch": 1}], "snapshot": None, "sparsity": []}):
        with pytest.raises(ValueError, match="was not written by this version of lightning_compress"):
            Recorder("val_acc").load_state_dict(state)
