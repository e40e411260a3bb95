from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.core.example_inputs import batch_size, call, tensors, to_device

X = torch.arange(6.0).reshape(3, 2)


class _Scaled(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale


@pytest.mark.parametrize(
    ("example_inputs", "expected"),
    [(X, X), ((X, 2.0), 2 * X), ({"scale": 3.0, "x": X}, 3 * X), (UserDict(x=X, scale=4.0), 4 * X)],
)
def test_call_spreads_positions_and_keywords(example_inputs: Any, expected: torch.Tensor) -> None:
    assert torch.equal(call(_Scaled(), example_inputs), expected)


@pytest.mark.parametrize("example_inputs", [X, (X, 2.0), {"scale": 1.0, "x": X}, ([X, X[:1]],), UserDict(x=X)])
def test_batch_size_is_that_of_the_first_tensor(example_inputs: Any) -> None:
    assert batch_size(example_inputs) == 3


@pytest.mark.parametrize(
    ("example_inputs", "message"),
    [("x", "got 'x'"), ((), "at least one tensor"), (torch.tensor(1.0), r"shape \(\)"), (X[:0], r"shape \(0, 2\)")],
)
def test_inputs_without_a_sample_are_refused(example_inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_size(example_inputs)


def test_to_device_moves_every_tensor_and_nothing_else() -> None:
    moved = to_device(UserDict(x=X, nested=[X, (X, 5)]), "meta")
    assert isinstance(moved, dict)
    assert [tensor.device.type for tensor in tensors(moved)] == ["meta"] * 3
    assert moved["nested"][1][1] == 5
