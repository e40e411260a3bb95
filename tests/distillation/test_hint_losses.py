"""Hints against loops over single numbers, finite differences, and what they must not depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.distillation.hint_losses import attention_transfer_loss, fitnet_loss, regressor

LOSSES = [fitnet_loss, attention_transfer_loss]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(sample: Tensor) -> list[float]:
    """The normalised map of a sample (C, positions), from plain numbers."""
    q = [sum(value**2 for value in position) for position in sample.T.tolist()]
    return [value / math.hypot(*q) for value in q]


def test_fitnet_is_the_papers_loss_per_entry() -> None:
    v, u = drawn(4, 3, 2, 5), drawn(4, 3, 2, 5, seed=1)
    paper = sum(math.dist(a.flatten().tolist(), b.flatten().tolist()) ** 2 / 2 for a, b in zip(v, u, strict=True)) / 4
    assert fitnet_loss(v, u).item() == pytest.approx(paper * 2 / 30)


@pytest.mark.parametrize("positions", [(7,), (3, 2), (2, 2, 3)])
def test_attention_against_loops(positions: tuple[int, ...]) -> None:
    v, u = drawn(4, 3, *positions), drawn(4, 8, *positions, seed=1)
    pairs = zip(v.flatten(2), u.flatten(2), strict=True)
    expected = sum(math.dist(attention(a), attention(b)) ** 2 for a, b in pairs) / 4
    assert attention_transfer_loss(v, u).item() == pytest.approx(expected)
    assert attention_transfer_loss(-1e3 * v.flip(1), u).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_finite_differences_reach_the_student_alone(loss: Any) -> None:
    v, u = drawn(2, 3, 4).requires_grad_(), drawn(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, u), [v])
    loss(v, u).backward()
    assert u.grad is None
    assert v.grad is not None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss: Any, dtype: torch.dtype) -> None:
    v, u = (100 * drawn(4, 16, 9)).to(dtype), (100 * drawn(4, 16, 9, seed=1)).to(dtype)  # their squares' sum is no half
    value = loss(v, u)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(v.double(), u.double()).item(), rel=1e-5)
    assert loss(v.float(), u).dtype == torch.float32


def test_a_map_of_zeros_has_a_value_and_a_gradient() -> None:
    v, u = torch.zeros(2, 3, 4), torch.ones(2, 5, 4)
    v[1] = 1
    v.requires_grad_()
    for teacher, expected in ((u, 0.5), (torch.zeros_like(u), 0.5), (u * torch.tensor([1.0, 0.0])[:, None, None], 1)):
        value = attention_transfer_loss(v, teacher)
        (gradient,) = torch.autograd.grad(value, v)
        assert value.item() == pytest.approx(expected)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_batch(loss: Any) -> None:
    assert loss(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4)) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "options", "kind"),
    [
        ((4, 6), (4, 9), {}, nn.Linear),
        ((4, 7, 6), (4, 7, 9), {"channel_dim": -1}, nn.Linear),
        ((4, 5, 7, 6), (4, 5, 7, 9), {"channel_dim": -1}, nn.Linear),
        ((4, 7, 6), (4, 7, 6), {"channel_dim": 1}, nn.Conv1d),
        ((4, 7, 16), (4, 9, 5), {"channel_dim": 1}, nn.Conv1d),
        ((4, 3, 8, 9), (4, 5, 8, 9), {}, nn.Conv2d),
        ((4, 3, 8, 9), (4, 5, 6, 2), {"channel_dim": 1}, nn.Conv2d),
        ((4, 3, 4, 5, 6), (4, 2, 3, 3, 6), {}, nn.Conv3d),
    ],
)
def test_a_regressor_leads_from_shape_to_shape(
    student: tuple[int, ...], teacher: tuple[int, ...], options: dict[str, int], kind: type[nn.Module]
) -> None:
    layer = regressor(torch.Size(student), teacher, **options)
    assert isinstance(layer, kind)
    assert layer(torch.zeros(student)).shape == teacher
    sizes = [a - b + 1 for a, b in zip(student[2:], teacher[2:], strict=True)] if kind is not nn.Linear else []
    last = options.get("channel_dim") == -1 or len(student) == 2
    channels = (teacher[-1] * student[-1]) if last else (teacher[1] * student[1])
    assert layer.weight.numel() == channels * math.prod(sizes)


def test_a_regressor_learns_what_a_linear_map_can() -> None:
    x, truth = drawn(64, 5, 6, 6), nn.Conv2d(5, 4, 3).double()
    layer = regressor(x.shape, (64, 4, 4, 4)).double()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = fitnet_loss(layer(x), truth(x))
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close(layer.weight, truth.weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "words"),
    [
        ((4, 6), (4, 9, 9), {}, r"\(4, 6\).*\(4, 9, 9\).*same number"),
        ((4,), (4,), {}, r"\(4,\)"),
        ((4, 6, 5), (4, 6, 7), {}, r"\(4, 6, 5\).*\(4, 6, 7\).*channel_dim=-1 for tokens.*channel_dim=1"),
        ((4, 6, 5), (4, 7, 5), {"channel_dim": -1}, r"\(4, 6, 5\).*\(4, 7, 5\).*only the last"),
        ((4, 6, 5, 5), (4, 6, 5, 6), {}, r"\(4, 6, 5, 5\).*\(4, 6, 5, 6\).*cannot enlarge"),
        ((4, 6, 5), (4, 6, 5), {"channel_dim": 2}, r"channel_dim=2.*1 or -1"),
        ((4, 6, 1, 1, 1, 1), (4, 6, 1, 1, 1, 1), {}, "at most 3"),
    ],
)
def test_impossible_regressors(student: Any, teacher: Any, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        regressor(student, teacher, **options)


def test_features_of_different_shapes() -> None:
    v = torch.zeros(4, 6, 5, 5)
    with pytest.raises(ValueError, match=r"\(4, 6, 5, 5\).*\(4, 8, 5, 5\).*regressor is needed"):
        fitnet_loss(v, torch.zeros(4, 8, 5, 5))
    with pytest.raises(ValueError, match=r"\(4, 6, 5, 5\).*\(4, 6, 5, 4\).*maps of one size"):
        attention_transfer_loss(v, torch.zeros(4, 6, 5, 4))
    with pytest.raises(ValueError, match=r"\(4, 6\).*need positions"):
        attention_transfer_loss(torch.zeros(4, 6), torch.zeros(4, 6))
