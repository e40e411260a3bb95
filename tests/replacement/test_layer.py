"""What a layer computes, written as a matrix product by hand; layers that are more than that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

from lightning_compress.replacement.layer import UnreplaceableError, linear_map, write_values


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("scale", torch.ones(4))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(bias: bool) -> None:
    layer, x = nn.Linear(5, 3, bias=bias), torch.randn(4, 5)
    found = linear_map(layer)
    assert (found.kind, found.sizes.inputs, found.sizes.outputs, found.sizes.bias) == ("linear", 5, 3, bias)
    y = x @ found.weight.t() + (found.bias if bias else 0)
    torch.testing.assert_close(y, layer(x))
    assert found.sizes.parameters == sum(one.numel() for one in layer.parameters())


def test_the_transposed_weight_of_transformers() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    layer, x = utils.Conv1D(3, 5), torch.randn(4, 5)
    found = linear_map(layer)
    assert (found.kind, found.sizes.inputs, found.sizes.outputs) == ("linear", 5, 3)
    before = layer(x)
    torch.testing.assert_close(x @ found.weight.t() + found.bias, before)
    write_values(layer, 2 * found.weight, 2 * found.bias)
    torch.testing.assert_close(layer(x), 2 * before)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 2, "stride": 2, "dilation": 2},
        {"padding": (0, 1), "stride": (1, 3), "bias": False},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "valid", "groups": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (2, 1), "padding_mode": "circular", "groups": 4},
    ],
    ids=str,
)
def test_a_convolution_is_a_product_with_unfolded_patches(settings: dict[str, Any]) -> None:
    layer, x = nn.Conv2d(4, 8, 3, **settings), torch.randn(2, 4, 7, 9)
    found = linear_map(layer)
    both = [one for size in reversed(found.padding) for one in (size, size)]
    padded = F.pad(x, both, mode="constant" if found.padding_mode == "zeros" else found.padding_mode)
    patches = F.unfold(padded, found.sizes.kernel, found.dilation, 0, found.stride)
    parts = patches.unflatten(1, (found.groups, -1))
    weight = found.weight.flatten(1).unflatten(0, (found.groups, -1))
    y = torch.einsum("goi,ngip->ngop", weight, parts).flatten(1, 2)
    expected = layer(x)
    y = y.view(expected.shape) + (0 if found.bias is None else found.bias[:, None, None])
    torch.testing.assert_close(y, expected)


def test_an_embedding() -> None:
    found = linear_map(nn.Embedding(7, 3, padding_idx=-1))
    assert (found.kind, found.sizes.inputs, found.sizes.outputs, found.padding_idx) == ("embedding", 7, 3, 6)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(2, 2, 3), "a transposed convolution"),
        (nn.LazyLinear(3), "it is lazy"),
        (nn.ReLU(), "neither a linear layer nor"),
        (parametrizations.spectral_norm(nn.Linear(3, 3)), "computed anew at each step"),
        (prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5), "a mask"),
        (weight_norm(nn.Linear(3, 3)), "weight_norm"),
        (Doubling(3, 3), "a forward of its own"),
        (Adapted(), "other tensors"),
        (nn.Embedding(3, 3, max_norm=1.0), "max_norm=1.0"),
        (nn.Embedding(3, 3, sparse=True), "sparse=True"),
        (nn.Conv1d(2, 2, 4, padding="same"), "more on one side"),
        (nn.Linear(3, 3).to(torch.complex64), "complex64"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_what_is_no_plain_layer_is_refused_by_its_reason(layer: nn.Module, reason: str) -> None:
    with pytest.raises(UnreplaceableError, match=reason):
        linear_map(layer)


def test_a_compiled_layer_is_refused() -> None:
    layer = nn.Linear(3, 3)
    layer.compile(backend="eager")
    with pytest.raises(UnreplaceableError, match="compiled"):
        linear_map(layer)
