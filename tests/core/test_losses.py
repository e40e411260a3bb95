"""The losses, against Python loops over single numbers, finite differences and what the papers say of the limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.core.losses import (
    cosine_loss,
    logit_regression_loss,
    soft_target_loss,
    soften,
    unit_vectors,
)

LOSSES = {"soft_target": soft_target_loss, "logit_regression": logit_regression_loss, "cosine": cosine_loss}
Loss = Callable[..., Tensor]


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: list[float], T: float) -> list[float]:
    top = max(z)
    powers = [math.exp((x - top) / T) for x in z]
    return [power / sum(powers) for power in powers]


def by_hand(kind: str, s: list[float], teachers: list[list[float]], weights: list[float], T: float) -> float:
    """The loss of one position, from plain numbers."""
    w = [weight / sum(weights) for weight in weights]
    if kind == "soft_target":
        soft = [softmax(t, T) for t in teachers]
        p = [sum(wi * row[c] for wi, row in zip(w, soft, strict=True)) for c in range(len(s))]
        q = softmax(s, T)
        return T**2 * sum(pc * math.log(pc / qc) for pc, qc in zip(p, q, strict=True) if pc > 0)
    if kind == "logit_regression":
        t = [sum(wi * row[c] for wi, row in zip(w, teachers, strict=True)) for c in range(len(s))]
        return sum((sc - tc) ** 2 for sc, tc in zip(s, t, strict=True)) / 2
    cosines = [sum(a * b for a, b in zip(s, t, strict=True)) / math.hypot(*s) / math.hypot(*t) for t in teachers]
    return sum(wi * (1 - cosine) for wi, cosine in zip(w, cosines, strict=True))


LAYOUTS = [((6, 5), None), ((2, 3, 5), -1), ((2, 5, 3, 2), 1)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_teachers", [1, 3])
@pytest.mark.parametrize(("shape", "class_dim"), LAYOUTS)
@pytest.mark.parametrize("kind", LOSSES)
def test_against_loops(kind: str, shape: tuple[int, ...], class_dim: Any, n_teachers: int, masked: bool) -> None:
    student, *teachers = (drawn(*shape, seed=i) for i in range(n_teachers + 1))
    weights = [1.0, 0.5, 2.5][:n_teachers]
    options = {"temperature": 2.5} if kind == "soft_target" else {}
    rows = [z.movedim(1 if class_dim is None else class_dim, -1) for z in (student, *teachers)]
    mask = torch.rand(rows[0].shape[:-1], generator=torch.Generator().manual_seed(1)) < 0.6
    places = [at for at in product(*map(range, mask.shape)) if mask[at] or not masked]
    s, *ts = ([row[at].tolist() for at in places] for row in rows)
    expected = sum(by_hand(kind, s[i], [t[i] for t in ts], weights, 2.5) for i in range(len(s))) / len(s)
    value = LOSSES[kind](
        student,
        teachers if n_teachers > 1 else teachers[0],
        weights=weights if n_teachers > 1 else None,
        class_dim=class_dim,
        mask=mask.long() if masked else None,
        **options,
    )
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_by_finite_differences_reach_the_student_alone(kind: str) -> None:
    student, first, second = (drawn(2, 4, 3, seed=i).requires_grad_() for i in range(3))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    def loss(s: Tensor) -> Tensor:
        return LOSSES[kind](s, [first, second], weights=[1, 3], class_dim=1, mask=mask)

    assert torch.autograd.gradcheck(loss, [student])
    assert torch.autograd.gradgradcheck(loss, [student])
    loss(student).backward()
    assert first.grad is None
    assert second.grad is None
    assert student.grad is not None
    assert (student.grad.abs().sum(1) > 0).equal(mask.bool())


def test_the_gradient_keeps_its_size_and_becomes_that_of_matching_logits() -> None:
    """Hinton et al. section 2.1: 1/(C T^2) (s - t) for zero-mean logits, before the factor T^2."""
    s, t = (z - z.mean(1, keepdim=True) for z in (drawn(4, 7), drawn(4, 7, seed=1)))
    limit = (s - t) / 7 / 4
    errors = []
    for temperature in (10.0, 100.0, 1000.0, 10_000.0):
        (gradient,) = torch.autograd.grad(soft_target_loss(s.requires_grad_(), t, temperature=temperature), s)
        errors.append(float((gradient - limit).norm() / limit.norm()))
    assert errors[-1] < 1e-3
    assert all(0.08 < after / before < 0.12 for before, after in pairwise(errors[1:]))


def test_another_batch_size_or_more_classes_without_probability_change_nothing() -> None:
    s, t = drawn(4, 7), drawn(4, 7, seed=1)
    value = soft_target_loss(s, t)
    torch.testing.assert_close(soft_target_loss(torch.cat([s, s]), torch.cat([t, t])), value)
    more = torch.full((4, 93), -1e9, dtype=torch.float64)
    torch.testing.assert_close(soft_target_loss(torch.cat([s, more], 1), torch.cat([t, more], 1)), value)
    tokens = soft_target_loss(s.expand(3, 4, 7), t.expand(3, 4, 7), class_dim=2)
    torch.testing.assert_close(tokens, value)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(
            st.lists(st.floats(-50, 50), min_size=n, max_size=n),
            min_size=2,
            max_size=2,
        )
    ),
    st.floats(0.1, 100),
    st.floats(-1000, 1000),
)
def test_soft_targets_know_no_offset_and_no_order_and_are_never_negative(
    rows: list[list[float]], temperature: float, offset: float
) -> None:
    s, t = (torch.tensor([row], dtype=torch.float64) for row in rows)
    value = soft_target_loss(s, t, temperature=temperature)
    tolerance = {"rtol": 1e-6, "atol": 1e-9 * temperature**2}
    assert value >= -tolerance["atol"]
    torch.testing.assert_close(soft_target_loss(s + offset, t, temperature=temperature), value, **tolerance)
    torch.testing.assert_close(soft_target_loss(s.flip(1), t.flip(1), temperature=temperature), value, **tolerance)
    assert soft_target_loss(t, t, temperature=temperature) == 0


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits_and_forbidden_classes(dtype: torch.dtype, ensemble: bool) -> None:
    inf = math.inf
    t = torch.tensor([[1e4, -1e4, 0.0, -inf], [-inf, 0.0, 1.0, -inf]], dtype=dtype)
    s = torch.tensor([[-1e4, 1e4, 0.0, -inf], [3.0, 1.0, 0.0, -inf]], dtype=dtype, requires_grad=True)
    value = soft_target_loss(s, [t, t] if ensemble else t, temperature=1.0)
    value.backward()
    q, p = softmax([3.0, 1.0, 0.0], 1.0), [0.0, *softmax([0.0, 1.0], 1.0)]
    second = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    assert value.item() == pytest.approx((2e4 + second) / 2, rel=1e-6)
    expected = torch.tensor([[-1.0, 1.0, 0.0, 0.0], [*(b - a for a, b in zip(p, q, strict=True)), 0.0]]) / 2
    torch.testing.assert_close(s.grad, expected.to(dtype), atol=1e-3 if dtype is torch.float16 else 1e-6, rtol=0)


def test_nan_is_not_hidden() -> None:
    s, t = drawn(2, 3), drawn(2, 3)
    t[0, 0] = math.nan
    for loss in LOSSES.values():
        assert loss(s, t).isnan()
        assert loss(t, s).isnan()


@pytest.mark.parametrize("kind", LOSSES)
def test_masked_positions_may_hold_anything_and_none_left_is_zero(kind: str) -> None:
    s, t = drawn(2, 3, 4), drawn(2, 3, 4, seed=1)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    expected = LOSSES[kind](s, t, class_dim=-1, mask=mask)
    t[0, 1] = math.nan
    s[0, 1] = 1e30
    s.requires_grad_()
    value = LOSSES[kind](s, t, class_dim=-1, mask=mask)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, s)
    assert gradient.isfinite().all()
    nothing = LOSSES[kind](s, t, class_dim=-1, mask=torch.zeros(2, 3))
    (gradient,) = torch.autograd.grad(nothing, s)
    assert nothing == 0
    assert gradient.count_nonzero() == 0
    assert LOSSES[kind](s[:0], t[:0], class_dim=-1) == 0


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    s, t = drawn(64, 50).to(dtype), drawn(64, 50, seed=1).to(dtype)
    exact = LOSSES[kind](s.double(), t.double())
    value = LOSSES[kind](s, t)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert LOSSES[kind](s.float(), t).dtype == torch.float32  # a teacher in its own dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LOSSES[kind](s, t).item() == value.item()


def test_a_vector_of_length_zero() -> None:
    s = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    value = cosine_loss(s, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    (gradient,) = torch.autograd.grad(value, s)
    assert value == 1
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1
    assert unit_vectors(s.half(), 1).dtype == torch.float32


def test_other_layouts_in_memory() -> None:
    s, t = drawn(2, 5, 3, 4), drawn(2, 5, 3, 4, seed=1)
    for loss in LOSSES.values():
        value = loss(s, t, class_dim=1)
        torch.testing.assert_close(loss(s.to(memory_format=torch.channels_last), t, class_dim=-3), value)
        torch.testing.assert_close(loss(s.movedim(1, -1), t.movedim(1, -1), class_dim=-1), value)


def test_the_lectures_worked_example() -> None:
    logits = torch.tensor([[100.0], [10.0], [1.0]])
    assert soften(logits, 100.0, dim=0).flatten().tolist() == pytest.approx([0.56, 0.23, 0.21], abs=0.005)
    assert soften(logits, 1.0, dim=0).flatten().tolist() == pytest.approx([1.0, 0.0, 0.0])


Z = torch.zeros


@pytest.mark.parametrize(
    ("student", "teacher", "options", "words"),
    [
        (Z(8, 10), Z(8, 100), {}, [r"\(8, 10\)", r"\(8, 100\)", "10 classes against 100"]),
        (Z(8, 10), Z(4, 10), {}, [r"\(8, 10\)", r"\(4, 10\)", "must be the same"]),
        (Z(8, 10), [Z(8, 10), Z(8, 9)], {}, ["those of teacher 1", "10 classes against 9"]),
        (Z(2, 3, 4), Z(2, 3, 4), {}, [r"\(2, 3, 4\)", "class_dim=-1 for tokens", "class_dim=1 for pixels"]),
        (Z(2, 3, 4), Z(2, 3, 4), {"class_dim": 3}, ["class_dim=3", "1 to 2, or -1"]),
        (Z(2, 3), Z(2, 3), {"class_dim": 0}, ["class_dim=0"]),
        (Z(2), Z(2, 1), {}, [r"\(2,\)"]),
        (Z(()), Z(()), {}, [r"\(\)"]),
        (Z(2, 3), [], {}, ["no teacher"]),
        (Z(2, 3), [Z(2, 3)] * 2, {"weights": [1.0]}, [r"\[1.0\] has 1 entries for 2 teachers"]),
        (Z(2, 3), [Z(2, 3)] * 2, {"weights": [1.0, -2.0]}, [r"\[1.0, -2.0\]", "0 or more"]),
        (Z(2, 3), [Z(2, 3)] * 2, {"weights": [0, 0]}, [r"\[0.0, 0.0\]", "above 0"]),
        (Z(2, 3), [Z(2, 3)] * 2, {"weights": [math.nan, 1]}, ["nan"]),
        (Z(2, 3, 4), Z(2, 3, 4), {"class_dim": 1, "mask": Z(2, 3)}, [r"mask has shape \(2, 3\)", r"\(2, 4\)"]),
    ],
)
def test_bad_input(student: Tensor, teacher: Any, options: dict[str, Any], words: list[str]) -> None:
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=".*".join(words)):
            loss(student, teacher, **options)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.tensor([[-100, 0, 2]]), "-100"),
        (torch.tensor([[0.0, 0.5, 1.0]]), "0.5"),
        (torch.tensor([[0.0, -math.inf, 0.0]]), "-inf"),
        (torch.tensor([[1.0, math.nan, 0.0]]), "nan"),
        (torch.tensor([[2, 1, 0]]), "2"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask: Tensor, found: str) -> None:
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=f"The mask holds {found}; expected 1 or True where a position counts"):
            loss(Z(1, 3, 4), Z(1, 3, 4), class_dim=-1, mask=mask)


@pytest.mark.parametrize("kind", ["soft_target", "cosine"])
def test_one_number_per_sample_is_no_class(kind: str) -> None:
    with pytest.raises(ValueError, match=r"\(2,\); expected \(N, C\).*logit_regression_loss"):
        LOSSES[kind](Z(2), Z(2))


@pytest.mark.parametrize("temperature", [0.0, -4.0, math.nan, math.inf])
def test_bad_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        soft_target_loss(Z(2, 3), Z(2, 3), temperature=temperature)
    with pytest.raises(ValueError, match="above 0"):
        soften(Z(2, 3), temperature)


def test_one_class_is_no_distribution_and_no_direction_but_a_number() -> None:
    for loss in (soft_target_loss, cosine_loss):
        with pytest.raises(ValueError, match=r"\(8, 1\).*logit_regression_loss"):
            loss(Z(8, 1), Z(8, 1))
    assert logit_regression_loss(Z(8, 1) + 2, Z(8, 1)) == 2


def test_regression_takes_one_number_per_sample() -> None:
    s, teachers = drawn(5).requires_grad_(), [drawn(5, seed=1), drawn(5, seed=2)]
    mask = torch.tensor([1, 0, 1, 1, 0])
    value = logit_regression_loss(s, teachers, weights=[1, 3], mask=mask)
    goals = [(a + 3 * b) / 4 for a, b in zip(*(t.tolist() for t in teachers), strict=True)]
    rest = [x - goal for x, goal in zip(s.tolist(), goals, strict=True)]
    assert value.item() == pytest.approx(sum(rest[i] ** 2 for i in (0, 2, 3)) / 2 / 3)
    (gradient,) = torch.autograd.grad(value, s)
    assert gradient.tolist() == pytest.approx([rest[i] / 3 if i in (0, 2, 3) else 0.0 for i in range(5)])


LOWEST = [-math.inf, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("n_teachers", [1, 2])
@pytest.mark.parametrize("low", LOWEST)
@pytest.mark.parametrize("kind", LOSSES)
def test_padding_with_infinite_logits_is_selected_away_before_anything_is_computed(
    kind: str, low: float, n_teachers: int
) -> None:
    """The loss and all gradients are those of the positions that count, taken out beforehand."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    features = drawn(2, 3, 6).float()
    teachers = [drawn(2, 3, 5, seed=i).float().masked_fill(mask[..., None] == 0, low) for i in range(2)][:n_teachers]
    found = []
    for selected in (False, True):
        weight = drawn(6, 5, seed=9).float().requires_grad_()
        logits = features @ weight + torch.zeros(2, 3).masked_fill(mask == 0, low)[..., None]
        if selected:
            kept = [logits[mask.bool()], [t[mask.bool()] for t in teachers]]
            value = LOSSES[kind](*kept)
        else:
            value = LOSSES[kind](logits, teachers, class_dim=-1, mask=mask)
        value.backward()
        assert weight.grad is not None
        found.append((value.detach(), weight.grad))
        if not selected:  # without a mask: positions with no class left don't count either
            torch.testing.assert_close(LOSSES[kind](logits, teachers, class_dim=-1).detach(), found[0][0])
    assert found[0][1].isfinite().all()
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("n_teachers", [1, 2])
@pytest.mark.parametrize("low", LOWEST)
@pytest.mark.parametrize("kind", LOSSES)
def test_classes_that_are_forbidden_to_both_are_as_if_they_were_not_there(
    kind: str, low: float, n_teachers: int
) -> None:
    """An action mask: other classes are forbidden in each sample."""
    allowed = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    features = drawn(3, 6).float()
    teachers = [drawn(3, 5, seed=i).float().masked_fill(~allowed, low) for i in range(2)][:n_teachers]
    weight = drawn(6, 5, seed=9).float().requires_grad_()
    rows = [
        LOSSES[kind]((features @ weight)[i : i + 1, row], [t[i : i + 1, row] for t in teachers])
        for i, row in enumerate(allowed)
    ]
    expected = torch.stack(rows).mean()
    (gradient,) = torch.autograd.grad(expected, weight)
    value = LOSSES[kind]((features @ weight).masked_fill(~allowed, low), teachers)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], gradient)
    added = torch.zeros(3, 5).masked_fill(~allowed, low)
    value = LOSSES[kind](features @ weight + added, teachers)
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], gradient)


@pytest.mark.parametrize("kind", LOSSES)
def test_classes_that_are_forbidden_to_one_only(kind: str) -> None:
    """Of soft targets, the student's classes share the teacher's probability; elsewhere what is forbidden leaves."""
    inf = math.inf
    free, some = drawn(1, 4), torch.tensor([[1.0, -inf, 2.0, 0.5]], dtype=torch.float64)
    for s, t in ((some, free), (free, some)):
        s = s.clone().requires_grad_()
        value = LOSSES[kind](s, t)
        (gradient,) = torch.autograd.grad(value, s)
        assert gradient.isfinite().all()
        at = [0, 2, 3]
        if kind == "soft_target" and t is some:
            p, q = softmax(t[0].tolist(), 4.0), softmax(s[0].tolist(), 4.0)
            expected = 16 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        else:
            expected = by_hand(kind, s[0, at].tolist(), [t[0, at].tolist()], [1.0], 4.0)
        assert value.item() == pytest.approx(expected)


def test_a_teacher_of_weight_0_is_not_looked_at() -> None:
    s, t = drawn(4, 5), drawn(4, 5, seed=1)
    for loss in LOSSES.values():
        assert loss(s, [t, t * math.nan], weights=[2, 0]) == loss(s, t)
