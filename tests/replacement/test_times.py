"""Times of layers and of their forms: which work is timed, by a clock that counts it."""

from __future__ import annotations

import pytest
import torch
from support.forms import TwoParts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.replacement.find import find_layers
from lightning_compress.replacement.layer import dense_layer, linear_map
from lightning_compress.replacement.times import time_forms


def test_all_calls_of_a_layer_and_of_its_forms_are_timed() -> None:
    """The clock counts the floating-point operations, so that each pass takes as many seconds as it has of them."""
    layer = nn.Conv2d(4, 8, 3)
    net = nn.Sequential(layer, nn.Conv2d(8, 4, 1), layer)
    found = find_layers(net, torch.zeros(2, 4, 9, 9)).layers["0"]
    assert found.inputs == ((2, 4, 9, 9), (2, 4, 7, 7))
    before = torch.get_rng_state()
    counter = FlopCounterMode(display=False)
    with counter:
        dense, others = time_forms(
            found,
            {rank: (TwoParts, {"rank": rank}) for rank in (1, 4)},
            repeats=3,
            clock=lambda: float(counter.get_total_flops()),
        )
    positions = 2 * (7 * 7 + 5 * 5)
    assert dense == 2 * positions * 8 * 36
    assert others == {rank: 2 * positions * rank * (36 + 8) for rank in (1, 4)}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 4, bias=False),
        nn.Embedding(5, 3, padding_idx=2),
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False, padding_mode="circular"),
        nn.Conv3d(1, 2, (1, 2, 3), dtype=torch.float64),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_layer_is_built_from_its_sizes(layer: nn.Module) -> None:
    other = dense_layer(linear_map(layer).sizes)
    assert repr(other) == repr(layer)
    assert linear_map(other).sizes == linear_map(layer).sizes
