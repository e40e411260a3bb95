from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from lightning_compress.trainer import rng


def draw() -> tuple[float, ...]:
    return (random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.randn(1)))


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    draw()  # leaves half a gaussian pair in Python's and NumPy's generators
    torch.save(rng.capture(), tmp_path / "state.pt")
    expected = [draw() for _ in range(3)]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    rng.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected
