"""The controller on a machine whose clock, load and noise are drawn: no real time passes."""

from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import BudgetController
from lightning_compress.serving import Setting, measured_settings
from lightning_compress.serving.latencies import seconds_at
from lightning_compress.trainer.operating_points import OperatingPoint

TABLE = {"quarter": 0.002, "half": 0.004, "three quarters": 0.007, "full": 0.010}
ACCURACY = {"quarter": 0.80, "half": 0.90, "three quarters": 0.93, "full": 0.95}
X = torch.zeros(8, 2)


class Machine:
    """Runs settings in the seconds of the table, times a load and factors of each setting and each run."""

    def __init__(self, *, own: Mapping[str, float] = {}, chance: Callable[[], float] = lambda: 1.0) -> None:
        self.now, self.load, self.own, self.chance = 0.0, 1.0, own, chance

    def settings(self, accuracy: Mapping[str, float] = ACCURACY) -> list[Setting]:
        return [Setting(name, partial(self.run, name), value) for name, value in accuracy.items()]

    def run(self, name: str, x: Tensor) -> Tensor:
        self.now += TABLE[name] * len(x) / 8 * self.load * self.own.get(name, 1.0) * self.chance()
        return x

    def controller(self, **options: object) -> BudgetController:
        given = {"table": {name: {8: seconds} for name, seconds in TABLE.items()}, "clock": lambda: self.now}
        return BudgetController(self.settings(), **given | options)


def served(controller: BudgetController, batches: int) -> list[str]:
    for _ in range(batches):
        controller(X)
    return [one.setting for one in controller.history][-batches:]


def changes(names: Sequence[str]) -> int:
    return sum(one != other for one, other in pairwise(names))


def test_the_budget_decides_and_its_steps_are_followed_at_once() -> None:
    controller = Machine().controller()
    assert served(controller, 2) == ["full", "full"]  # there is no budget yet
    for budget, expected in ((5.0, "half"), (7.4, "three quarters"), (3.0, "quarter"), (100.0, "full"), (5.0, "half")):
        controller.budget_ms = budget
        assert set(served(controller, 20)) == {expected}
    controller.budget_ms = None
    assert served(controller, 1) == ["full"]


def test_the_load_is_followed_and_the_controller_recovers() -> None:
    machine = Machine()
    controller = machine.controller(budget_ms=8.0)
    assert set(served(controller, 30)) == {"three quarters"}
    machine.load = 1.9
    names = served(controller, 60)
    assert set(names[2:]) == {"quarter", "half"}  # it is careful after two misses
    assert set(names[25:]) == {"half"}
    assert controller.history[-1].expected_ms == pytest.approx(4.0 * 1.9, rel=0.01)
    machine.load = 1.0
    names = served(controller, 60)
    assert set(names[20:]) == {"three quarters"}
    assert changes([one.setting for one in controller.history]) == 3


def test_one_outlier_changes_nothing() -> None:
    machine = Machine()
    controller = machine.controller(budget_ms=7.5)
    for load in [50.0] + ([1.0] * 9 + [50.0]) * 5:  # the first run too, which is slow on many machines
        machine.load = load
        controller(X)
    assert {one.setting for one in controller.history} == {"three quarters"}
    assert controller.history[-1].load == pytest.approx(1.0)


def test_a_budget_at_the_edge_of_a_setting_does_not_flutter() -> None:
    def at_the_edge(budget: float, **options: object) -> list[str]:
        numbers = random.Random(0)
        machine = Machine(chance=lambda: numbers.lognormvariate(0, 0.05))
        controller = machine.controller(budget_ms=budget, **options)
        names = served(controller, 400)
        assert statistics.mean([one.ms <= budget for one in controller.history][50:]) >= 0.95
        return names

    budgets = (7.2, 7.6, 8.0, 8.2)
    calm = [changes(at_the_edge(budget)) for budget in budgets]
    nervous = [changes(at_the_edge(budget, hysteresis=0.0, patience=1)) for budget in budgets]
    assert max(calm) <= 10
    assert sum(calm) <= sum(nervous) / 3


def test_jitter_of_the_budget_does_not_flutter() -> None:
    random_numbers = random.Random(0)
    controller = Machine().controller()
    for _ in range(200):
        controller.choose(8, budget_ms=7.35 * (1 + random_numbers.uniform(-0.02, 0.02)))
        controller(X)
    assert changes([one.setting for one in controller.history]) <= 2  # until the noise is known


def test_a_setting_that_is_slower_than_its_table_is_left_for_good() -> None:
    """Without a memory of it the controller would take it up again whenever the faster one runs as expected."""
    machine = Machine(own={"three quarters": 1.3})
    controller = machine.controller(budget_ms=8.0)
    names = served(controller, 300)
    assert names[:100].count("three quarters") <= 8
    assert names[100:].count("three quarters") <= 10  # the share of misses that it may have
    machine.own = {}  # and it is not left for ever
    assert "three quarters" in served(controller, 400)[-50:]


def test_nothing_fits() -> None:
    machine = Machine()
    controller = machine.controller()
    with pytest.warns(UserWarning, match=r"No setting keeps 1 ms for 8 samples: the fastest one, 'quarter', is exp"):
        controller.choose(8, budget_ms=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert served(controller, 3) == ["quarter"] * 3
    assert not controller.history[-1].fits
    controller.budget_ms = 5.0
    assert served(controller, 2) == ["half"] * 2
    machine.load = 4.0
    with pytest.warns(UserWarning, match="No setting keeps 5 ms"):
        assert served(controller, 30)[-10:] == ["quarter"] * 10
    machine.load = 1.0
    assert served(controller, 30)[-1] == "half"
    assert controller.history[-1].fits


def test_battery() -> None:
    controller = Machine().controller(battery={1.0: 12.0, 0.5: 6.0, 0.1: 3.0})
    found = [controller.choose(8, battery=level).name for level in (1.0, 0.7, 0.5, 0.05)]
    assert found == ["full", "three quarters", "half", "quarter"]
    assert controller.budget_ms == 3.0
    controller.set_battery(0.75)
    assert controller.budget_ms == pytest.approx(9.0)
    controller = Machine().controller(battery=lambda level: 20 * level)
    assert controller.choose(8, battery=0.25).name == "half"


def test_batch_sizes_have_budgets_of_their_own() -> None:
    table = {name: {1: seconds / 4, 8: seconds} for name, seconds in TABLE.items()}
    controller = Machine().controller(table=table, budget_ms=3.0)
    assert [controller.choose(size).name for size in (1, 4, 8)] == ["full", "half", "quarter"]
    assert [seconds_at(table["half"], size) for size in (1, 8, 15)] == pytest.approx([0.001, 0.004, 0.007])


def test_a_table_comes_back_from_json() -> None:
    controller = Machine().controller(budget_ms=5.0)
    again = Machine().controller(table=json.loads(json.dumps(controller.table)), budget_ms=5.0)
    assert again.table == controller.table
    assert served(again, 3) == served(controller, 3)


def test_dominated_settings_are_dropped() -> None:
    accuracy = ACCURACY | {"three quarters": 0.89, "half": 0.90}
    machine = Machine()
    controller = BudgetController(machine.settings(accuracy), table={name: {8: s} for name, s in TABLE.items()})
    assert [one.name for one in controller.settings] == ["quarter", "half", "full"]
    crossing = {name: {1: seconds, 8: seconds} for name, seconds in TABLE.items()}
    crossing["three quarters"][1] = 0.0001  # faster for one sample
    assert len(BudgetController(machine.settings(accuracy), table=crossing).settings) == 4


def test_the_table_is_measured_by_the_clock_and_again() -> None:
    machine = Machine()
    controller = BudgetController(machine.settings(), X, batch_sizes=[2, 8], repeats=5, clock=lambda: machine.now)
    for name, seconds in TABLE.items():
        assert controller.table[name] == pytest.approx({2: seconds / 4, 8: seconds})
    machine.load = 2.0
    controller.measure(X, repeats=5)
    assert controller.table["full"] == pytest.approx({8: 0.02})
    again = machine.controller(table=controller.table, budget_ms=8.5)
    assert again.choose(8).name == "half"


def test_accuracies_of_modules_and_points() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(3)]
    network = nn.Linear(4, 3).eval()
    inputs, targets = (torch.cat(one) for one in zip(*batches, strict=True))
    expected = float((network(inputs).argmax(1) == targets).double().mean())
    assert measured_settings({"a": network}, batches)[0].accuracy == pytest.approx(expected)
    points = [OperatingPoint("a", network, contextlib.nullcontext)]
    assert measured_settings(points, batches) == measured_settings({"a": network}, batches)
    score = measured_settings({"a": network}, batches, right=lambda out, _: out[:, 0])[0].accuracy
    assert score == pytest.approx(float(network(inputs)[:, 0].detach().mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_ms": 0.0}, "budget_ms is the milliseconds .* got 0.0"),
        ({"battery": {}}, "battery={} has no level"),
        ({"battery": {100: 20.0, 20: 5.0}}, "The level of a battery is from 0 to 1; got 100"),
        ({"patience": 0}, "patience must be a whole number, at least 1; got 0"),
        ({"table": {"full": {8: 0.01}}}, "The table needs seconds above 0 of setting 'quarter'"),
        ({"table": {name: {8: 0.0} for name in TABLE}}, "The table needs seconds above 0 of setting 'quarter'"),
        (
            {"table": {name: {0: 0.01} for name in TABLE}},
            r"whole numbers of at least 1, of setting 'quarter'; got \[0\]",
        ),
        ({"table": {name: {"a": 0.01} for name in TABLE}}, r"batch sizes, .* of setting 'quarter'; got \['a'\]"),
        ({"table": {name: {8: 0.01, "8": 0.02} for name in TABLE}}, "batch sizes, .* of setting 'quarter'"),
        ({"table": None}, "Pass example_inputs="),
        ({"example_inputs": X}, "Pass example_inputs="),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Machine().controller(**options)


def test_more_refusals() -> None:
    controller, settings = Machine().controller(), Machine().settings()
    with pytest.raises(ValueError, match="pass battery="):
        controller.choose(8, battery=0.5)
    with pytest.raises(ValueError, match=r"The level of a battery is from 0 to 1; got 1.5"):
        Machine().controller(battery={1: 5.0}).set_battery(1.5)
    with pytest.raises(ValueError, match=r"pass budget_ms=3.0 or battery=0.5, and not both"):
        Machine().controller(battery={1: 5.0}).choose(8, budget_ms=3.0, battery=0.5)
    for size in (0, -8):
        with pytest.raises(ValueError, match=f"number of samples of a batch, at least 1; got {size}"):
            controller.choose(size)
    with pytest.raises(ValueError, match="different names"):
        BudgetController([settings[0], settings[0]], X)
    with pytest.raises(ValueError, match="'a' is in training mode: call eval"):
        BudgetController([Setting("a", nn.Linear(2, 2), 0.5)], X)
    with pytest.raises(ValueError, match="'a' is in training mode: call eval"):
        measured_settings({"a": nn.Dropout()}, [(X, torch.zeros(8, dtype=torch.long))])
    with pytest.raises(ValueError, match="accuracy must be a finite number; got nan"):
        Setting("a", nn.Linear(2, 2), math.nan)
    with pytest.raises(ValueError, match="from 1 to the 8 samples"):
        controller.measure(X, batch_sizes=[16])


def test_an_accelerator_has_finished_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr("lightning_compress.serving.controller.accelerators_of", lambda *_: {torch.device("cuda")})
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: events.append("finished"))

    def clock() -> float:
        events.append("clock")
        return float(len(events))

    settings = [Setting("only", lambda x: events.append("run") or x, 0.5)]
    BudgetController(settings, table={"only": {8: 1.0}}, clock=clock)(X)
    assert events == ["finished", "clock", "run", "finished", "clock"]


def drawn_trace(seed: int, batches: int) -> tuple[list[float], list[float], list[float]]:
    """Loads and budgets that step every 40 to 120 batches, and noise with outliers."""
    numbers = random.Random(seed)

    def steps(values: Sequence[float]) -> list[float]:
        found: list[float] = []
        while len(found) < batches:
            found += [numbers.choice(values)] * numbers.randrange(40, 120)
        return found[:batches]

    noise = [numbers.lognormvariate(0, 0.03) * (4 if numbers.random() < 0.01 else 1) for _ in range(batches)]
    return steps([1.0, 1.0, 1.4, 2.0]), steps([5.0, 8.0, 12.0, 16.0]), noise


@pytest.mark.parametrize("seed", range(6))
def test_against_the_best_choice_of_one_who_knows_the_load(seed: int) -> None:
    """He takes for each batch the most accurate setting within the budget; the noise he does not know."""
    loads, budgets, noise = drawn_trace(seed, 1000)
    chances = iter(noise)
    machine = Machine(own={"half": 1.05, "full": 0.95}, chance=lambda: next(chances))
    controller = machine.controller()
    best = []
    for load, budget in zip(loads, budgets, strict=True):
        machine.load = load
        controller.budget_ms = budget
        controller(X)
        fitting = [n for n, s in TABLE.items() if 1000 * s * load * machine.own.get(n, 1.0) <= budget]
        best.append(max(ACCURACY[name] for name in fitting))
    kept = statistics.mean(one.ms <= one.budget_ms for one in controller.history)
    assert kept >= 0.95
    assert (
        statistics.mean(one.accuracy for one in controller.history) >= statistics.mean(best) - 0.012
    )  # each step costs misses
