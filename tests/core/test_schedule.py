from __future__ import annotations

import itertools
import math

import pytest

from lightning_compress.core.schedule import SCHEDULES, amount_at


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.9166, 0.999])
def test_starts_at_nothing_ends_exactly_and_never_falls(schedule: str, amount: float) -> None:
    values = [amount_at(step / 100, amount, schedule=schedule) for step in range(101)]
    assert values[-1] == amount
    assert values == sorted(values)
    assert values[0] == (amount if schedule == "one_shot" else 0.0)
    assert amount_at(1.7, amount, schedule=schedule) == amount
    assert amount_at(-0.3, amount, schedule=schedule) == values[0]


def test_cubic_follows_zhu_and_gupta() -> None:
    # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0, written out for t = 3 of 8
    assert amount_at(3 / 8, 0.8) == pytest.approx(0.8 + (0 - 0.8) * (1 - 3 / 8) ** 3)


def test_exponential_removes_the_same_share_of_what_is_left_each_time() -> None:
    left = [1 - amount_at(step / 5, 0.9, schedule="exponential") for step in range(6)]
    shares = [after / before for before, after in itertools.pairwise(left)]
    assert max(shares) - min(shares) < 1e-12
    assert left[-1] == pytest.approx(0.1)


def test_cosine_is_flat_at_both_ends() -> None:
    step = 1e-4
    slope_start = (amount_at(step, 1.0, schedule="cosine") - amount_at(0.0, 1.0, schedule="cosine")) / step
    slope_middle = (amount_at(0.5 + step, 1.0, schedule="cosine") - amount_at(0.5, 1.0, schedule="cosine")) / step
    assert slope_start < 1e-3
    assert slope_middle == pytest.approx(math.pi / 2, rel=1e-3)


@pytest.mark.parametrize("amount", [-0.1, 1.1, 50, float("nan")])
def test_refuses_an_amount_that_is_no_fraction(amount: float) -> None:
    with pytest.raises(ValueError, match="fraction of the original"):
        amount_at(0.5, amount)


def test_refuses_an_unknown_schedule_and_an_endless_ramp() -> None:
    with pytest.raises(ValueError, match=r"one_shot, linear, cubic, exponential, cosine; got 'cubik'"):
        amount_at(0.5, 0.5, schedule="cubik")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="never reaches"):
        amount_at(0.5, 1.0, schedule="exponential")
