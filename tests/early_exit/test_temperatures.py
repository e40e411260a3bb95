"""Temperatures against bisection in double precision, and where none is the best."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.early_exit import fit_temperatures
from lightning_compress.early_exit.temperatures import fit_temperature


def planted(samples: int, temperature: float, *, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits, and targets drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]


def bisected(logits: Tensor, targets: Tensor) -> float:
    """Return the zero of the derivative by 1 / T of the negative log-likelihood, from autograd."""
    low, high = 1e-4, 1e4
    for _ in range(80):
        b = torch.tensor(math.sqrt(low * high), dtype=torch.double, requires_grad=True)
        (slope,) = torch.autograd.grad(F.cross_entropy(b * logits.double(), targets), b)
        low, high = (low, b.item()) if slope > 0 else (b.item(), high)
    return 1 / low


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 4), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_likelihood_has_its_maximum_there(seed: int, temperature: float, scale: float) -> None:
    logits, targets = planted(300, temperature, seed=seed)
    assert fit_temperature(logits * scale, targets) == pytest.approx(bisected(logits * scale, targets), rel=1e-6)


def test_a_planted_temperature_is_found_again() -> None:
    logits, targets = planted(20_000, 2.5)
    assert fit_temperature(logits, targets) == pytest.approx(2.5, rel=0.03)
    assert fit_temperature(logits, targets) == pytest.approx(bisected(logits, targets), rel=1e-6)


def test_every_exit_gets_its_own() -> None:
    pairs = [planted(500, temperature, seed=3) for temperature in (1.0, 2.0)]
    targets = pairs[0][1]
    logits = [pairs[0][0], 4 * pairs[0][0]]
    one, other = fit_temperatures(logits, targets)
    assert other == pytest.approx(4 * one, rel=1e-6)


def test_half_precision_is_fitted_in_float32() -> None:
    logits, targets = planted(1000, 1.5)
    logits = logits.bfloat16()
    assert fit_temperature(logits, targets) == pytest.approx(bisected(logits, targets), rel=1e-6)


def test_forbidden_classes_and_broken_samples_do_not_count() -> None:
    logits, targets = planted(200, 1.5)
    expected = fit_temperature(logits, targets)
    forbidden = torch.cat([logits, torch.full((200, 1), -math.inf)], 1)
    assert fit_temperature(forbidden, targets) == pytest.approx(expected, rel=1e-6)
    broken = torch.tensor([[math.nan, 0, 0, 0, 0], [math.inf, 0, 0, 0, 0], [0, -math.inf, 0, 0, 0]])
    more = torch.cat([logits, broken]), torch.cat([targets, torch.tensor([1, 1, 1])])
    assert fit_temperature(*more) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="exit 2: none of 3 samples has finite logits"):
        fit_temperature(broken, torch.tensor([1, 1, 1]), name="exit 2")


@pytest.mark.parametrize("samples", [10, 1000])
def test_where_all_are_right_one_of_two_more_may_be_wrong(samples: int) -> None:
    logits, _ = planted(samples, 1.0)
    targets = logits.argmax(1)
    with pytest.warns(UserWarning, match=rf"exit 1: all {samples} samples .* are right"):
        temperature = fit_temperature(logits, targets, name="exit 1")
    e = 1 / (samples + 2)
    expected = bisected(logits, (1 - e) * F.one_hot(targets, 5).double() + e / 5)
    assert temperature == pytest.approx(expected, rel=1e-6)
    assert len((logits / temperature).softmax(1).amax(1).unique()) > samples // 3  # scores still differ


def test_one_class_alone_is_all_right_or_has_a_temperature() -> None:
    logits, _ = planted(100, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits[:, 0] += 2
        targets = torch.zeros(100).long()
        assert fit_temperature(logits, targets) == pytest.approx(bisected(logits, targets), rel=1e-6)


def test_where_all_are_wrong_it_is_bounded_and_scores_still_differ() -> None:
    logits, _ = planted(100, 1.0)
    with pytest.warns(UserWarning, match="no higher than those of other classes"):
        temperature = fit_temperature(logits, logits.argmin(1))
    assert temperature < 100
    assert len((logits / temperature).softmax(1).amax(1).unique()) > 95


def test_equal_logits_keep_the_temperature_one() -> None:
    with pytest.warns(UserWarning, match="all equal"):
        assert fit_temperature(torch.ones(10, 3), torch.zeros(10).long()) == 1.0
