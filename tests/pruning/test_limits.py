"""What stays whatever is asked for: a floor per layer, and widths at multiples."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from support.small import SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor

from lightning_compress import IterativePruningCallback
from lightning_compress.pruning.masks import prune_weights

LAYERS = ("net.conv.weight", "net.hidden.weight", "net.head.weight")


def best_of_all(scores: dict[str, Tensor], alive: dict[str, Tensor], n_drop: int, floors: dict[str, int]) -> set[Any]:
    """Of all sets of so many entries that leave every tensor its floor, the one that loses least."""
    entries = [(name, index) for name, score in scores.items() for index in range(len(score))]
    best: tuple[float, set[Any]] = (math.inf, set())
    for dropped in map(set, itertools.combinations(entries, n_drop)):
        left = {
            name: sum((name, index) not in dropped for index in range(len(score))) for name, score in scores.items()
        }
        dead = all(bool(alive[name][index]) or (name, index) in dropped for name, index in entries)
        if dead and all(left[name] >= floors[name] for name in scores):
            lost = sum(float(scores[name][index]) for name, index in dropped if alive[name][index])
            best = min(best, (lost, dropped), key=lambda one: one[0])
    return best[1]


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_every_layer_keeps_its_floor_and_the_others_lose_as_little_as_can_be(seed: int, with_dead: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(size, generator=generator) * 10.0**-i
        for i, (name, size) in enumerate(zip("abc", (5, 4, 3), strict=True))
    }
    alive = {name: torch.rand(len(one), generator=generator) > 0.2 * with_dead for name, one in scores.items()}
    floors = {name: min(1, int(alive[name].sum())) for name in scores}  # int(0.2 * 5), and one at least
    amount, total = 0.5, 12
    masks = prune_weights(scores, amount, alive=alive if with_dead else None, min_left=0.2)
    dead = sum(int((~one).sum()) for one in alive.values())
    expected = best_of_all(scores, alive, max(round(amount * total), dead), floors)
    assert {(name, i) for name, mask in masks.items() for i in range(len(mask)) if not mask[i]} == expected


def fitted(module: SmallModule, **options: Any) -> list[str]:
    pruning = IterativePruningCallback(0.97, **({"end_epoch": 2.0, "every_n_steps": 4} | options))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet_trainer(callbacks=[pruning], max_epochs=3).fit(module, shuffled(), plain())
    return [str(one.message) for one in said]


def with_small_weights() -> SmallModule:
    module = SmallModule()
    with torch.no_grad():
        module.net.hidden.weight.mul_(1e-3)
    return module


def test_a_layer_of_the_smallest_weights_is_not_emptied_and_it_is_said_once() -> None:
    module = with_small_weights()
    said = fitted(module, schedule="one_shot", end_epoch=None)
    sizes = {name: module.get_parameter(name).numel() for name in LAYERS}
    zeros = {name: int((module.get_parameter(name) == 0).sum()) for name in LAYERS}
    assert sizes["net.hidden.weight"] - zeros["net.hidden.weight"] == int(0.01 * sizes["net.hidden.weight"])
    assert sum(zeros.values()) == round(0.97 * sum(sizes.values()))
    for messages in (said, fitted(with_small_weights())):
        assert len([one for one in messages if "min_left=0.01 keeps the last entries of net.hidden" in one]) == 1


def test_without_a_floor_a_layer_may_be_emptied() -> None:
    module = with_small_weights()
    said = fitted(module, min_left=0.0, schedule="one_shot", end_epoch=None)
    assert not module.net.hidden.weight.any()
    assert any("Every entry of net.hidden.weight is pruned" in one for one in said)


def test_the_floor_gives_way_to_the_amount() -> None:
    scores = {"a": torch.rand(1000), "b": torch.rand(1000) * 1e-3}
    masks = prune_weights(scores, 0.995, min_left=0.5)
    assert [int(masks[name].sum()) for name in "ab"] == [8, 2]


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_floor_is_a_fraction(value: float) -> None:
    with pytest.raises(ValueError, match="min_left must be a fraction"):
        IterativePruningCallback(0.5, min_left=value)


@pytest.mark.parametrize(("round_to", "told"), [(16, True), (1, False), (2, False)])
def test_rounding_that_keeps_channels_is_said(round_to: int, told: bool) -> None:
    pruning = IterativePruningCallback(0.5, granularity="neuron", scope="layer", round_to=round_to, target="net.hidden")
    module = SmallModule()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet_trainer(callbacks=[pruning], max_epochs=3).fit(module, shuffled(), plain())
    messages = [str(one.message) for one in said if "round_to" in str(one.message)]
    assert module.net.hidden.out_features == (16 if told else 8)
    assert len(messages) == told
    assert not told or "0 of 16 channels are pruned, where amount=0.5 asks for 8" in messages[0]
