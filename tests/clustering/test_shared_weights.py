from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.clustering.shared_weights import (
    SharedWeights,
    cluster_weights,
    compression_rate,
    sum_by_cluster,
)

LECTURE = torch.tensor([[0.5, 1.3, 4.3, -0.1], [0.1, -0.2, -1.2, 0.3], [1.0, 3.0, -0.4, 0.1], [-0.5, -0.1, -3.4, -5.0]])


def test_the_functional_twin_leaves_the_tensor_alone() -> None:
    before = LECTURE.clone()
    codebook, indices = cluster_weights(LECTURE, 4)
    assert torch.equal(LECTURE, before)
    assert indices.shape == LECTURE.shape
    for j in range(4):
        assert codebook[j] == pytest.approx(float(LECTURE[indices == j].mean()))


def test_the_rate_by_hand() -> None:
    assert compression_rate(16, 4) == pytest.approx(16 * 32 / (16 * 2 + 4 * 32))
    assert compression_rate(1000, 1, bits=16) == 1000
    assert compression_rate(430_500, 32) == pytest.approx(430_500 * 32 / (430_500 * 5 + 32 * 32))


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (300, 301)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_by_cluster(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values, index = torch.randn(shape).to(dtype), torch.randint(0, 5, shape, dtype=torch.uint8)
    sums = sum_by_cluster(values, index, 6)
    assert sums.dtype == torch.float64
    for j in range(6):
        assert float(sums[j]) == pytest.approx(float(values[index == j].double().sum()), abs=1e-9)


def test_sums_do_not_lose_small_gradients_among_many() -> None:
    values = torch.full((2**24 + 2**20,), 1.0)
    index = torch.zeros_like(values, dtype=torch.uint8)
    assert float(sum_by_cluster(values, index, 1)) == len(values)  # a float32 sum stops at 2^24


def zeros_and_values(shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return torch.where(x.abs() < 0.4, 0.0, x)


@pytest.mark.parametrize("rule", ["sum", "mean"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_against_autograd_through_the_table(rule: str, layout: str) -> None:
    """The oracle is a network whose weight is codebook[index], with the codebook as the parameter that is trained."""
    conv = nn.Conv2d(3, 8, 3, bias=False)
    conv.weight.data = zeros_and_values((8, 3, 3, 3))
    if layout == "channels last":
        conv.to(memory_format=torch.channels_last)
    shared = SharedWeights.cluster({"weight": conv.weight}, 5)
    index = shared.index["weight"].long()
    table = shared.codebook.float().requires_grad_()
    momentum = torch.zeros_like(table)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.05, momentum=0.9)
    counts = torch.bincount(index.flatten(), minlength=6).float()
    for step in range(20):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        conv(x).square().mean().backward()
        shared.share_gradients(rule)  # type: ignore[arg-type]
        optimizer.step()
        shared.share_values()

        table.grad = None
        F.conv2d(x, table[index]).square().mean().backward()
        assert table.grad is not None
        gradient = table.grad / counts.clamp(min=1) if rule == "mean" else table.grad
        gradient[0] = 0.0
        momentum = 0.9 * momentum + gradient
        table.data -= 0.05 * momentum
        assert torch.allclose(shared.codebook.float(), table.detach(), atol=1e-5)
        assert torch.allclose(conv.weight.detach(), table.detach()[index], atol=1e-5)
        assert (conv.weight.detach() == 0).equal(index == 0)


def test_members_that_moved_apart_meet_at_their_mean() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, -2.0, 0.0, 1.0]))
    shared = SharedWeights.cluster({"w": weight}, 2)
    weight.data += torch.tensor([0.3, 0.0, 0.5, 9.0, 0.0])
    shared.share_values()
    assert weight.tolist() == pytest.approx([1.1, 1.1, -1.5, 0.0, 1.1])


def test_sharing_equal_values_changes_no_bit() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = nn.Parameter(torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).to(dtype))
        shared = SharedWeights.cluster({"w": weight}, 7)
        before = weight.detach().clone()
        shared.share_values()
        assert torch.equal(weight.detach(), before)


def test_one_table_for_several_parameters() -> None:
    a, b = nn.Parameter(torch.tensor([1.0, 5.0])), nn.Parameter(torch.tensor([[1.2], [5.2], [0.0]]))
    shared = SharedWeights.cluster({"a": a, "b": b}, 2)
    assert a.tolist() == pytest.approx([1.1, 5.1])
    a.grad = torch.tensor([1.0, 2.0])
    shared.share_gradients("sum")
    assert b.grad is not None  # it shares the values, so it moves with them
    assert b.grad.flatten().tolist() == [1.0, 2.0, 0.0]
    b.grad = torch.tensor([[10.0], [20.0], [30.0]])
    shared.share_gradients("mean")
    assert a.grad.tolist() == [5.5, 11.0]


def test_without_any_gradient_nothing_happens() -> None:
    weight = nn.Parameter(torch.randn(10))
    SharedWeights.cluster({"w": weight}, 3).share_gradients()
    assert weight.grad is None


def test_what_is_pruned_later_leaves_its_cluster() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, -2.0]))
    shared = SharedWeights.cluster({"w": weight}, 2)
    weight.data[0] = 0.0
    weight.grad = torch.tensor([100.0, 1.0, 1.0, 1.0])
    shared.share_gradients("sum")
    assert weight.grad.tolist() == [0.0, 2.0, 2.0, 1.0]
    weight.data[0] = 7.0  # momentum moves it
    shared.share_values()
    assert weight.tolist() == [0.0, 1.0, 1.0, -2.0]
    assert shared.n_values == 3


def test_a_mean_that_happens_to_be_zero_goes_on_training() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, -2.0]))
    shared = SharedWeights.cluster({"w": weight}, 2)
    weight.data -= 1.0
    shared.share_values()
    assert weight.tolist() == [0.0, 0.0, -3.0]
    weight.grad = torch.ones(3)
    shared.share_gradients("sum")
    assert weight.grad.tolist() == [2.0, 2.0, 1.0]


def test_a_cluster_whose_members_are_all_pruned() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, -2.0]))
    shared = SharedWeights.cluster({"w": weight}, 2)
    weight.data[:2] = 0.0
    shared.take_zeros()
    shared.share_values()
    assert weight.tolist() == [0.0, 0.0, -2.0]
    assert torch.isfinite(shared.codebook).all()


def test_bits_per_weight() -> None:
    weight = nn.Parameter(torch.arange(100.0) + 1)
    shared = SharedWeights.cluster({"w": weight}, 8)
    assert shared.bits_per_weight == pytest.approx((100 * 3 + 8 * 32) / 100)
    weight.data[0] = 0.0
    shared.take_zeros()
    assert shared.bits_per_weight == pytest.approx((100 * math.log2(9) + 9 * 32) / 100)
    with pytest.warns(UserWarning, match="w: every entry is zero, so all of them count as pruned and stay zero"):
        assert SharedWeights.cluster({"w": nn.Parameter(torch.zeros(4))}, 8).bits_per_weight == pytest.approx(8.0)
