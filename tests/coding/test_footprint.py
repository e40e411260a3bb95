from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.coding import footprint as module
from lightning_compress.coding import save_compressed
from lightning_compress.coding.footprint import footprint


def test_bytes_are_those_of_the_file_and_shrink_with_the_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(100, 100)
    dense = footprint(model, torch.randn(3, 100), repeats=1).bytes
    model.weight.data[:, 10:] = 0.0
    pruned = footprint(model, torch.randn(3, 100), repeats=1).bytes
    assert pruned == save_compressed(model, tmp_path / "f").bytes == (tmp_path / "f").stat().st_size
    assert dense - pruned > 4 * 9000 - 10_000 * 0.47 / 8 - 20  # the entropy of a tenth is 0.469 bits


def test_file_that_gives_back_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module.load_compressed

    def forgetful(path: Path) -> Any:
        return honest(path) | {"bias": torch.zeros(5)}

    monkeypatch.setattr(module, "load_compressed", forgetful)
    with pytest.raises(RuntimeError, match=r"\['bias'\]"):
        footprint(nn.Linear(4, 5), torch.randn(3, 4), repeats=1)
