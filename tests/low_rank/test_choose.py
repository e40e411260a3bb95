"""What is chosen for each layer, against brute force, counts by torch, and clocks that the tests set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_compress.low_rank.choose import Chooser
from lightning_compress.low_rank.costs import costs_of
from lightning_compress.low_rank.forms import FORMS
from lightning_compress.low_rank.sites import Seen, Site
from lightning_compress.measure.macs import count_macs
from lightning_compress.replacement.find import Layer
from lightning_compress.replacement.layer import linear_map
from lightning_compress.replacement.swap import swap


def site(layer: nn.Module, *shapes: tuple[int, ...], method: Any = "auto") -> Site:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_()
    seen = Layer(map=linear_map(layer), calls=len(shapes), inputs=shapes, macs=0)
    return Site(f"{layer}", Seen(seen, None), method)


def chooser(cost: Any, clock: Any = None, **sites: Site) -> Chooser:
    return Chooser(sites, cost, clock or (lambda: 0.0))


CONV = (2, 12, 9, 9)


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker"])
def test_costs_are_those_that_torch_counts(form: str) -> None:
    layer = nn.Conv2d(12, 16, 3, stride=(2, 1), padding=(0, 1), groups=2)
    one = site(layer, CONV)
    assert one.dense.macs == 2 * count_macs(layer, torch.zeros(CONV))[0]
    numbers = one.of_rank(form, 3)
    assert numbers is not None
    swap(layer, *one.timed_as(form, numbers))
    costs = one.costs(form, numbers)
    assert costs.macs == 2 * count_macs(layer, torch.zeros(CONV))[0]
    assert costs.parameters == sum(parameter.numel() for parameter in layer.parameters())


def test_a_layer_that_runs_twice_costs_twice() -> None:
    linear = nn.Linear(4, 8)
    assert costs_of([linear], [(3, 5, 4), (2, 4)]) == (40, 32 * (15 + 2))
    assert costs_of([nn.Embedding(9, 2), nn.Linear(2, 6, bias=False)], [(3, 5)]) == (30, 12 * 15)


def test_one_rank_for_all_layers_replaces_those_that_get_cheaper() -> None:
    sites = {
        "wide": site(nn.Linear(30, 40), (1, 30)),
        "square": site(nn.Linear(16, 16), (1, 16)),
        "thin": site(nn.Linear(30, 4), (1, 30)),
    }
    found = chooser("parameters", **sites).by_rank(dict.fromkeys(sites, 8))
    assert found["wide"].option.form == "linear"
    assert found["wide"].option.numbers == (8,)
    assert found["wide"].after.parameters == 8 * 70 + 40
    assert found["square"].why == "rank 8 takes 272 instead of 272 parameters"
    assert found["thin"].why == "it has no rank 8"


def test_a_rank_takes_the_form_that_loses_least_for_what_it_saves() -> None:
    one = site(nn.Conv2d(12, 16, 3, bias=False), CONV)
    (found,) = chooser("macs", layer=one).by_rank({"layer": 5}).values()
    best = {}
    for form, numbers in {"channel": (5,), "spatial": (5,), "tucker": (5, 5)}.items():
        (lost,) = one.lost(form, [numbers])
        saved = one.dense.macs - one.costs(form, numbers).macs
        best[form] = -torch.log1p(torch.tensor(-lost, dtype=torch.float64)) / saved
    assert found.option.form == min(best, key=lambda form: float(best[form]))
    (only,) = chooser("macs", layer=site(nn.Conv2d(12, 16, 3), CONV, method="spatial")).by_rank({"layer": 5}).values()
    assert only.option.form == "spatial"


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_takes_the_cheapest_form_that_keeps_so_much(energy: float) -> None:
    one = site(nn.Conv2d(12, 16, 3, bias=False), CONV)
    (found,) = chooser("parameters", layer=one).by_energy(energy).values()
    least = min(
        (
            one.costs(form, numbers).parameters
            for form in ("channel", "spatial", "tucker")
            for numbers in one.numbers(form)
            if one.lost(form, [numbers])[0] <= 1 - energy
        ),
    )
    if least < one.dense.parameters:
        assert found.after.parameters == least
        assert found.option.lost <= 1 - energy
    else:
        assert found.option.form == "dense"
        assert found.why == f"no form of it that keeps {energy:g} of the variance has fewer parameters"


def test_a_budget_is_kept_and_no_choice_within_it_loses_less() -> None:
    sites = {
        "a": site(nn.Linear(6, 7, bias=False), (1, 6)),
        "b": site(nn.Linear(8, 5, bias=False), (1, 8)),
        "c": site(nn.Conv2d(3, 4, 3, bias=False), (1, 3, 3, 3)),
    }
    total, fixed = 42 + 40 + 108 + 30, 30
    found = chooser("parameters", **sites).by_budget(0.6, total)
    cost = sum(one.after.parameters for one in found.values())
    assert cost + fixed <= 0.6 * total
    options = []
    for one in sites.values():
        every = [(one.dense.parameters, 0.0)]
        for form in one.forms():
            numbers = one.numbers(form)
            every += [(one.costs(form, r).parameters, lost) for r, lost in zip(numbers, one.lost(form, numbers))]  # noqa: B905
        options.append(every)
    best = min(
        -sum(float(torch.log1p(torch.tensor(-min(lost, 1 - 1e-12), dtype=torch.float64))) for _, lost in some)
        for some in itertools.product(*options)
        if sum(one for one, _ in some) + fixed <= 0.6 * total
    )
    assert sum(one.option.loss for one in found.values()) <= best * 1.1 + 1e-9  # one step of the hull at most


def test_a_budget_that_cannot_be_met_quotes_the_least_and_that_one_can() -> None:
    sites = {"a": site(nn.Linear(20, 30), (1, 20)), "b": site(nn.Linear(30, 10), (1, 30))}
    total = 630 + 310 + 60
    one = chooser("parameters", **sites)
    with pytest.raises(ValueError, match=r"budget=0.1 of the parameters can't be met: the least possible is 0\.19, "):
        one.by_budget(0.1, total)  # 20 + 30 + 30, 30 + 10 + 10, 60
    assert {choice.option.numbers for choice in one.by_budget(0.19, total).values()} == {(1,)}
    assert {choice.option.form for choice in one.by_budget(1.0, total).values()} == {"dense"}


class Clock:
    """A clock that plain layers move: by seconds for each multiply-accumulate of theirs, and for each call."""

    def __init__(self, per_call: float) -> None:
        self.now, self.per_call = 0.0, per_call

    def __call__(self) -> float:
        return self.now

    def ran(self, layer: nn.Module, args: tuple[torch.Tensor, ...], _: object) -> None:
        if type(layer) is nn.Linear:
            self.now += self.per_call + costs_of([layer], [tuple(args[0].shape)]).macs * 1e-9


@pytest.fixture
def clock() -> Iterator[Clock]:
    made = Clock(per_call=1e-5)
    handle = register_module_forward_hook(made.ran)
    yield made
    handle.remove()


def test_by_latency_a_layer_stays_where_no_form_is_faster(clock: Clock) -> None:
    """Two calls of a small layer take longer than one, though they have fewer multiply-accumulates."""
    small, large = (site(nn.Linear(n, n, bias=False), (1, n)) for n in (64, 512))
    found = chooser("latency", clock, small=small, large=large).by_rank({"small": 8, "large": 8})
    assert found["small"].option.form == "dense"
    assert found["small"].why.startswith("rank 8 takes 0.021 ms instead of 0.0141 ms")
    assert found["large"].option.form == "linear"
    assert found["large"].option.cost == pytest.approx(2e-5 + 8 * 1024 * 1e-9, rel=0.05)
    assert found["large"].dense == pytest.approx(1e-5 + 512 * 512 * 1e-9)
    budget = chooser("latency", clock, small=small, large=large).by_budget(0.5, found["large"].dense + 1e-5)
    assert budget["small"].why == "no form of it has fewer seconds"
    assert all(one % 8 == 0 for one in budget["large"].option.numbers)
    assert budget["large"].option.cost <= 0.5 * (found["large"].dense + 1e-5)


def test_what_is_timed_draws_nothing() -> None:
    one = site(nn.Conv2d(16, 16, 3), (1, 16, 6, 6))
    state = torch.get_rng_state()
    ticks = itertools.count()
    chooser("latency", lambda: float(next(ticks)), layer=one).by_rank({"layer": 8})
    assert torch.equal(torch.get_rng_state(), state)


def test_forms_have_records_of_their_own_names() -> None:
    assert all(name == form.form for name, form in FORMS.items())
