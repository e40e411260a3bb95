"""What is seen from the values: each kind of tensor in the form meant for it, at about the bits that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_compress.coding import load_compressed, save_compressed
from lightning_compress.coding.ans import AnsWriter
from lightning_compress.coding.encodings import positions

G = torch.Generator().manual_seed(0)
NORMAL = torch.randn(64, 100, generator=G)
SCALES = torch.rand(64, 1, generator=G) + 0.01


def integers(bits: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    return torch.randint(-most, most + 1, NORMAL.shape, generator=G).float()


@pytest.mark.parametrize(
    ("weight", "encoding", "bits"),
    [
        (NORMAL, "raw", 32),
        (NORMAL.half().float(), "float16", 16),
        (NORMAL.bfloat16().float() * 2**40, "", 16),
        (NORMAL.sign() * 0.3, "grid of 2, one scale", 1),
        (NORMAL.sign() * NORMAL.abs().mean(1, keepdim=True), "grid of 2, 64 scales", 1.33),
        (integers(8) * SCALES, "grid of 255, 64 scales", 8.5),
        (integers(4) * SCALES, "grid of 15, 64 scales", 4.3),
        (integers(4) * SCALES[:50].T.repeat(1, 2), "grid of 15, 100 scales", 4.6),
        (integers(2) * 0.7, "one scale", 1.6),
        ((integers(4) * SCALES).bfloat16().float(), "", 12),
        (NORMAL[0, :16][torch.randint(16, NORMAL.shape, generator=G)], "codebook of 16", 4.1),
        (torch.zeros(64, 100), "packed", 0.01),
        (torch.arange(6400), "packed", 13.1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_takes_the_bits_of_its_kind(weight: Tensor, encoding: str, bits: float, tmp_path: Path) -> None:
    size = save_compressed({"w": weight}, tmp_path / "f")
    assert encoding in size.tensors[0].encoding
    assert size.tensors[0].bits_per_weight <= bits + 0.05
    assert torch.equal(load_compressed(tmp_path / "f")["w"], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_scales_as_quantizers_make_them_are_found(dtype: torch.dtype, tmp_path: Path) -> None:
    """max / (2^(b-1) - 1) per channel, computed in float32: no magnitude need be the scale itself."""
    weight = NORMAL.to(dtype)
    for bits in (3, 4, 8):
        most = 2 ** (bits - 1) - 1
        scale = (weight.abs().amax(1, keepdim=True) / most).to(dtype)
        quantized = (weight / scale).round().clamp(-most, most) * scale
        size = save_compressed({"w": quantized}, tmp_path / "f", coder="none")
        own = torch.finfo(dtype).bits / 100
        assert size.tensors[0].bits_per_weight <= bits + own + 0.1
        assert torch.equal(load_compressed(tmp_path / "f")["w"], quantized)


def test_four_bits_are_half_of_eight(tmp_path: Path) -> None:
    weight = torch.randn(512, 512, generator=G)
    size = {}
    for bits in (4, 8):
        most = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(1, keepdim=True) / most
        size[bits] = save_compressed({"w": (weight / scale).round() * scale}, tmp_path / "f", coder="none").bytes
    assert size[4] / size[8] == pytest.approx(0.5, abs=0.005)


def map_bytes(present: np.ndarray, shape: tuple[int, ...]) -> float:
    writer = AnsWriter()
    positions.write_map(writer, present.reshape(-1), shape)
    return writer.bits / 8


def test_a_learned_map_sees_uneven_rows_and_columns_and_costs_nothing_where_there_are_none() -> None:
    random = np.random.default_rng(0)
    rows, columns = random.exponential(1, 300), random.exponential(1, 784)
    chances = np.minimum(0.03 * np.outer(rows, columns), 0.9)
    uneven = random.random(chances.shape) < chances
    ideal = -np.log2(np.where(uneven, chances, 1 - chances)).sum() / 8
    share = uneven.mean()
    one_chance = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * uneven.size / 8
    assert ideal < map_bytes(uneven, (300, 784)) < 0.5 * ideal + 0.5 * one_chance
    even = random.random(chances.shape) < 0.03
    share = even.mean()
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * even.size / 8
    assert map_bytes(even, (300, 784)) < entropy + 5


def test_a_learned_map_sees_that_units_without_inputs_have_no_outputs(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    alive = random.random(100) < 0.5
    into = random.random((100, 60)) < 0.5 * alive[:, None]
    chances = np.repeat(alive * 0.3, 4) * np.ones((60, 1))  # four places to the channel, as a flattened convolution has
    out = random.random(chances.shape) < chances
    known = chances > 0
    ideal = -np.log2(np.where(out, chances, 1 - chances)[known]).sum() / 8
    writer = AnsWriter()
    positions.write_map(writer, into.reshape(-1), (100, 60))
    positions.write_map(writer, alive, (100,))  # biases between them
    before = writer.bits
    positions.write_map(writer, out.reshape(-1), (60, 400))
    assert ideal < (writer.bits - before) / 8 < 1.03 * ideal < map_bytes(out, (60, 400))
    state = {"a": torch.from_numpy(into), "b": torch.from_numpy(into[:, 0]), "c": torch.from_numpy(out)}
    save_compressed(state, tmp_path / "f")
    assert all(torch.equal(one, state[name]) for name, one in load_compressed(tmp_path / "f").items())


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_gaps_lead_back_to_where_they_come_from(width: int) -> None:
    present = np.random.default_rng(width).random(5000) < 0.03
    places, gaps = positions.padded(present, width)
    assert gaps.max() < 1 << width
    assert set(np.flatnonzero(present)) <= set(places.tolist())
    walked: list[Any] = list(np.cumsum(gaps.astype(int) + 1) - 1)
    assert walked == places.tolist()
    skipped = np.flatnonzero(~np.isin(places, np.flatnonzero(present)))
    assert all(gaps[i] == (1 << width) - 1 for i in skipped)  # padding only where a gap is full
