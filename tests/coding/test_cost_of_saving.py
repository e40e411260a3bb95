"""What can't win is not tried: counted by calls, for times say nothing on a busy machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.coding import load_compressed, save_compressed
from lightning_compress.coding.encodings import adaptive, grid


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many steps of learned maps were coded, and how often scales were searched for."""
    found: Counter[str] = Counter()
    odds, candidates = adaptive._odds, grid._candidates

    def count_odds(*args: Any) -> Any:
        found["blocks"] += 1
        return odds(*args)

    def count_candidates(*args: Any) -> Any:
        found["scales"] += 1
        return candidates(*args)

    monkeypatch.setattr(adaptive, "_odds", count_odds)
    monkeypatch.setattr(grid, "_candidates", count_candidates)
    return found


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def with_one_zero() -> Tensor:
    tensor = normal(40, 100)
    tensor[3, 4] = 0
    return tensor


@pytest.mark.parametrize(
    ("tensor", "blocks", "scales"),
    [
        (torch.zeros(10_000), 0, 8),
        (torch.zeros(100, 100), 0, 8),
        (torch.ones(512), 0, 2),
        (normal(8), 0, 0),
        (normal(512), 0, 0),
        (normal(64, 16, 3, 3), 0, 0),
        (with_one_zero(), 4, 0),
    ],
    ids=["zeros", "a matrix of zeros", "ones", "8", "512", "a convolution", "one zero"],
)
def test_what_cannot_win_is_not_tried(
    tensor: Tensor, blocks: int, scales: int, calls: Counter[str], tmp_path: Path
) -> None:
    save_compressed({"w": tensor}, tmp_path / "f")
    assert calls["blocks"] <= blocks
    assert calls["scales"] <= scales
    assert torch.equal(load_compressed(tmp_path / "f")["w"], tensor)


def test_what_can_win_is(calls: Counter[str], tmp_path: Path) -> None:
    rows = (normal(60) > 0.5).float()[:, None] * normal(60, 50)
    save_compressed({"rows": rows, "grid": (normal(60, 50) * 3).round() * 0.37}, tmp_path / "f")
    assert calls["blocks"] > 1000
    assert calls["scales"] > 0
