"""Weights of every type and size: few bits cost them no more than their definition does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import load_compressed, save_compressed
from lightning_compress.binary.signs import channel_scales, real_gradient
from lightning_compress.binary.weights import binarize_weights
from lightning_compress.clustering.shared_weights import SharedWeights
from lightning_compress.quantization.grids import Granularity, weight_scales
from lightning_compress.quantization.weights import quantize_weights

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = {  # of the largest weights of a channel, in units of a type's smallest normal number or largest number
    "subnormal": lambda info: info.tiny / 16,
    "smallest normal": lambda info: info.tiny * 4,
    "small": lambda info: info.tiny * 1000,
    "one": lambda info: 1.0,
    "thousands": lambda info: 8000.0,
}


def weights(dtype: torch.dtype, size: str, shape: tuple[int, ...] = (3, 64)) -> Tensor:
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draw[-1] *= 4.0  # one channel has other weights
    return (draw * SIZES[size](torch.finfo(dtype)) / 8).to(dtype)


def exact(tensor: Tensor) -> np.ndarray:
    """The values in a type that holds squares of all of them."""
    return tensor.detach().double().numpy().astype(np.longdouble)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_grid_costs_weights_of_any_type_and_size_what_it_should(
    dtype: torch.dtype, size: str, bits: int, granularity: Granularity
) -> None:
    layer = nn.Linear(64, 3, bias=False, dtype=dtype)
    layer.weight.data = weights(dtype, size)
    real = exact(layer.weight)
    quantize_weights(layer, bits, granularity=granularity)
    held, top = exact(layer.weight), 2 ** (bits - 1) - 1
    assert layer.weight.dtype == dtype
    largest = np.abs(real).max(axis=1 if granularity == "channel" else None, keepdims=True)
    covering = np.rint(real / (largest / top)) * (largest / top)
    # What the type rounds away: half a unit in the last place of each value.
    info = torch.finfo(dtype)
    unit = np.maximum(np.abs(held) * info.eps, np.longdouble(info.smallest_normal) * info.eps)
    allowed = np.sqrt(np.square(covering - real).sum()) + np.sqrt(np.square(unit).sum())
    assert np.sqrt(np.square(held - real).sum()) <= 1.1 * allowed
    if bits >= 6:
        step = largest / top
        assert (np.abs(held - real) <= 0.5 * step + step / 3 + unit).all()
    for channel in held if granularity == "channel" else held.reshape(1, -1):
        assert len(np.unique(channel)) <= 2 * top + 1


@pytest.mark.parametrize("bits", [2, 8])
def test_scales_are_not_of_sixteen_bits(bits: int) -> None:
    for dtype in TYPES:
        scales = weight_scales(weights(dtype, "small"), bits)
        assert scales.dtype == torch.promote_types(dtype, torch.float32)
        assert channel_scales(weights(dtype, "small")).dtype == scales.dtype


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_means_of_magnitudes_are_those_of_the_exact_values(dtype: torch.dtype, size: str) -> None:
    w = weights(dtype, size, (2, 5000))  # 65,504 is the largest number of float16, and 2049 none of it
    alive = torch.ones(w.shape, dtype=torch.bool)
    alive[1, :50] = False
    expected = np.abs(exact(w)).mean(1)
    fewer = np.abs(exact(w))[1, 50:].mean()
    tolerance = 1e-5 * expected + float(torch.finfo(torch.float32).tiny) * (dtype != torch.float64)
    assert (np.abs(exact(channel_scales(w)).flatten() - expected) <= tolerance).all()
    masked = exact(channel_scales(w, alive=alive)).flatten()
    assert abs(masked[0] - expected[0]) <= tolerance[0]
    assert abs(masked[1] - fewer) <= tolerance[1]


@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_of_signs_with_scales_sum_in_enough_digits(dtype: torch.dtype) -> None:
    w, gradient = weights(dtype, "one", (2, 5000)), torch.full((2, 5000), 30.0, dtype=dtype)
    signs = np.where(exact(w) >= 0, 1.0, -1.0)
    alpha = np.abs(exact(w)).mean(1, keepdims=True)
    shared = (exact(gradient) * signs).sum(1, keepdims=True) / 5000
    expected = signs * shared + alpha * exact(gradient) * (np.abs(exact(w)) <= 1)
    found = exact(real_gradient(gradient, w, scaling="mean"))
    assert np.abs(found - expected).max() <= max(torch.finfo(dtype).eps, 1e-5) * np.abs(expected).max()


@pytest.mark.parametrize("technique", ["grid", "signs", "clusters"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_file_gives_back_weights_of_few_values_bit_for_bit(
    technique: str, size: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    layer = nn.Linear(64, 3, bias=False, dtype=dtype)
    layer.weight.data = weights(dtype, size)
    if technique == "grid":
        quantize_weights(layer, 8)
    elif technique == "signs":
        binarize_weights(layer, scaling="mean")
    else:
        SharedWeights.cluster({"weight": layer.weight}, 5)
    save_compressed(layer, tmp_path / "it.lcz")
    fresh = nn.Linear(64, 3, bias=False, dtype=dtype)
    load_compressed(tmp_path / "it.lcz", fresh)
    assert torch.equal(fresh.weight, layer.weight)
    assert fresh.weight.count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_stores_eight_bits_for_weights_of_sixteen(dtype: torch.dtype, tmp_path: Path) -> None:
    layer = nn.Linear(400, 50, bias=False, dtype=dtype)
    layer.weight.data = weights(dtype, "one", (50, 400))
    quantize_weights(layer, 8)
    assert save_compressed(layer, tmp_path / "it.lcz").bytes < 1.05 * 50 * 400


def test_a_cut_keeps_the_scales_of_small_channels() -> None:
    layer = nn.Linear(64, 3, bias=False, dtype=torch.float16)
    layer.weight.data = weights(torch.float16, "subnormal")
    uniform = quantize_weights(layer, 8)
    before = uniform.scales["weight"].clone()
    positions = torch.tensor([0, 2])
    layer.weight.data = layer.weight.data[positions]
    uniform.follow_cut(layer, {"weight": {0: positions}})
    assert torch.equal(uniform.scales["weight"], before[positions])
