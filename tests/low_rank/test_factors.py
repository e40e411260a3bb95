"""The closed forms against numpy's SVD of W C^(1/2), against least squares, and against the layer itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_compress.low_rank.factors import errors, factor
from lightning_compress.low_rank.ranks import BudgetError, Option, hull, rank_grid, spend
from lightning_compress.low_rank.spatial import SpatialSplit
from lightning_compress.low_rank.tucker import TuckerSplit


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance_of(n: int, seed: int, samples: int | None = None) -> Tensor:
    """Of correlated inputs; of fewer samples than inputs it is singular."""
    x = drawn(samples or 4 * n, n, seed=seed) @ drawn(n, n, seed=seed + 1)
    return x.T @ x / len(x)


def loss_of(change: Tensor, covariance: Tensor | None) -> float:
    change = change.reshape(len(change), -1)
    square = change @ change.T if covariance is None else change @ covariance @ change.T
    return float(square.trace())


def best_losses(weight: Tensor, covariance: Tensor | None) -> np.ndarray:
    """Eckart and Young: the squared singular values of W C^(1/2) that a rank drops."""
    matrix = weight.numpy()
    if covariance is not None:
        values, vectors = np.linalg.eigh(covariance.numpy())
        matrix = matrix @ (vectors * np.sqrt(values.clip(0))) @ vectors.T
    dropped = np.linalg.svd(matrix, compute_uv=False)[::-1] ** 2
    return np.concatenate([[0.0], dropped.cumsum()])[::-1]


SIZES = [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)]


@pytest.mark.parametrize(("n_out", "n_in"), SIZES)
@pytest.mark.parametrize("samples", [None, 0, 3], ids=["plain", "full", "singular"])
def test_factors_reach_the_bound_of_eckart_and_young(n_out: int, n_in: int, samples: int | None) -> None:
    weight = drawn(n_out, n_in)
    covariance = None if samples is None else covariance_of(n_in, 1, samples or None)
    bound = best_losses(weight, covariance)
    scale = bound[0]
    np.testing.assert_allclose(errors(weight, covariance).numpy(), bound, rtol=1e-10, atol=1e-12 * scale)
    for rank in range(1, min(n_out, n_in) + 1):
        first, second, _ = factor(weight, rank, covariance)
        assert first.shape == (rank, n_in)
        assert second.shape == (n_out, rank)
        assert loss_of(weight - second @ first, covariance) == pytest.approx(bound[rank], rel=1e-10, abs=1e-12 * scale)
        torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))


@pytest.mark.parametrize(("n_out", "n_in"), SIZES)
def test_the_highest_rank_is_the_weight_whatever_the_inputs_were(n_out: int, n_in: int) -> None:
    weight = drawn(n_out, n_in)
    for covariance in (None, covariance_of(n_in, 1, 2), torch.zeros(n_in, n_in, dtype=torch.float64)):
        first, second, _ = factor(weight, min(n_out, n_in), covariance)
        torch.testing.assert_close(second @ first, weight, rtol=1e-10, atol=1e-10)


def test_the_mean_of_the_outputs_stays() -> None:
    x = drawn(50, 8) + 3.0
    weight, bias = drawn(5, 8, seed=1), drawn(5, seed=2)
    centred = x - x.mean(0)
    first, second, shift = factor(weight, 2, centred.T @ centred / len(x), x.mean(0))
    dense, thin = x @ weight.T + bias, x @ (second @ first).T + bias + shift
    torch.testing.assert_close(dense.mean(0), thin.mean(0))
    # No other weight of this rank with any bias is nearer, which a search by gradients from it confirms.
    best = float((dense - thin).square().sum())
    parts = [
        part.clone(memory_format=torch.contiguous_format).requires_grad_() for part in (first, second, bias + shift)
    ]
    optimizer = torch.optim.LBFGS(parts, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (dense - x @ (parts[1] @ parts[0]).T - parts[2]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure()) == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_that_no_matrix_has_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must be from 1 to 4 .* got {rank}"):
        factor(torch.ones(4, 6), rank)


# ---------------------------------------------------------------------- convolutions


def merged_spatial(first: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("riy,orx->oiyx", first[..., 0], second[:, :, 0])


def merged_tucker(first: Tensor, core: Tensor, last: Tensor) -> Tensor:
    return torch.einsum("ri,sryx,os->oiyx", first[..., 0, 0], core, last[..., 0, 0])


@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (3, 5, 2, 3), (1, 1, 3, 3)])
def test_plain_spatial_split_is_the_svd_of_the_unfolded_kernel(shape: tuple[int, ...]) -> None:
    weight = drawn(*shape)
    bound = best_losses(weight.permute(0, 3, 1, 2).reshape(shape[0] * shape[3], -1), None)
    split = SpatialSplit(weight, None)
    np.testing.assert_allclose(split.losses.numpy(), bound, rtol=1e-7, atol=1e-8 * bound[0])
    for rank in range(1, len(bound)):
        change = weight - merged_spatial(*split.parts(rank))
        assert loss_of(change, None) == pytest.approx(bound[rank], rel=1e-10, abs=1e-12 * bound[0])


@pytest.mark.parametrize("samples", [None, 5], ids=["full", "singular"])
def test_spatial_split_knows_its_loss_and_its_last_part_is_the_least_squares(samples: int | None) -> None:
    weight, covariance = drawn(4, 3, 3, 2), covariance_of(18, 3, samples)
    split = SpatialSplit(weight, covariance)
    total = loss_of(weight, covariance)
    for rank in range(1, len(split.losses)):
        first, second = split.parts(rank)
        change = weight - merged_spatial(first, second)
        assert loss_of(change, covariance) == pytest.approx(float(split.losses[rank]), rel=1e-6, abs=1e-8 * total)
        # the gradient with respect to the last part is zero
        slope = (change.reshape(4, -1) @ covariance).reshape(weight.shape)
        gradient = torch.einsum("oiyx,riy->orx", slope, first[..., 0])
        assert float(gradient.abs().max()) < 1e-7 * total
    torch.testing.assert_close(merged_spatial(*split.parts(len(split.losses) - 1)), weight, rtol=1e-10, atol=1e-10)


def test_tucker_split_is_the_best_where_only_one_side_is_reduced() -> None:
    weight, covariance = drawn(4, 3, 3, 2), covariance_of(18, 3)
    for of_inputs in (None, covariance):
        split = TuckerSplit(weight, of_inputs)
        bound = best_losses(weight.reshape(4, -1), of_inputs)
        np.testing.assert_allclose(split.losses(3).numpy(), bound, rtol=1e-6, atol=1e-8 * bound[0])
        *parts, loss = split.parts(3, 2)
        assert loss == pytest.approx(bound[2], rel=1e-6)
        assert loss_of(weight - merged_tucker(*parts), of_inputs) == pytest.approx(bound[2], rel=1e-8)
    bound = best_losses(weight.transpose(0, 1).reshape(3, -1), None)
    *parts, _ = TuckerSplit(weight, None).parts(2, 4)
    assert loss_of(weight - merged_tucker(*parts), None) == pytest.approx(bound[2], rel=1e-10)


@pytest.mark.parametrize("samples", [None, 5], ids=["full", "singular"])
def test_tucker_split_knows_its_loss_and_is_exact_at_full_ranks(samples: int | None) -> None:
    weight, covariance = drawn(4, 3, 3, 2), covariance_of(18, 3, samples)
    for of_inputs in (None, covariance):
        split = TuckerSplit(weight, of_inputs)
        total = loss_of(weight, of_inputs)
        for first, second in itertools.product(range(1, 4), range(1, 5)):
            *parts, loss = split.parts(first, second)
            assert loss_of(weight - merged_tucker(*parts), of_inputs) == pytest.approx(loss, rel=1e-6, abs=1e-8 * total)
            assert loss <= float(split.losses(first)[second]) * (1 + 1e-9)
        torch.testing.assert_close(merged_tucker(*split.parts(3, 4)[:3]), weight, rtol=1e-10, atol=1e-10)


def test_a_first_rank_above_what_the_second_needs_is_no_error() -> None:
    weight = drawn(8, 12, 2, 1)
    *parts, loss = TuckerSplit(weight, None).parts(10, 1)
    assert parts[0].shape == (10, 12, 1, 1)
    assert loss_of(weight - merged_tucker(*parts), None) == pytest.approx(loss, rel=1e-9)


def test_rounds_of_hooi_end_where_a_plain_loop_of_numpy_ends() -> None:
    weight = drawn(6, 5, 3, 3)
    tensor = weight.numpy()
    u = np.linalg.svd(tensor.reshape(6, -1))[0][:, :2]
    for _ in range(200):
        v = np.linalg.svd(np.einsum("oiyx,os->siyx", tensor, u).transpose(1, 0, 2, 3).reshape(5, -1))[0][:, :3]
        u = np.linalg.svd(np.einsum("oiyx,ir->oryx", tensor, v).reshape(6, -1))[0][:, :2]
    core = np.einsum("oiyx,os,ir->sryx", tensor, u, v)
    bound = float((tensor**2).sum() - (core**2).sum())
    *_, loss = TuckerSplit(weight, None).parts(3, 2, rounds=200)
    assert loss == pytest.approx(bound, rel=1e-6)


# ---------------------------------------------------------------------- the budget


def curve(generator: torch.Generator, n: int) -> list[Option]:
    losses = torch.rand(n, generator=generator).sort(descending=True).values.mul(0.9).tolist()
    return [
        Option("dense", (), float(n + 1), 0.0),
        *(Option("a", (rank + 1,), float(rank + 1), lost) for rank, lost in enumerate(losses)),
    ]


def brute_force(layers: list[list[Option]], budget: float) -> float:
    return min(
        sum(option.loss for option in options)
        for options in itertools.product(*layers)
        if sum(option.cost for option in options) <= budget
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_water_level_is_optimal_for_every_cost_at_which_it_stops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = {str(k): curve(generator, 5) for k in range(4)}
    hulls = [hull(options) for options in layers.values()]
    largest = max(high.cost - low.cost for steps in hulls for high, low in itertools.pairwise(steps))
    for budget in range(4, 25):
        chosen = spend(layers, budget)
        cost, loss = sum(one.cost for one in chosen.values()), sum(one.loss for one in chosen.values())
        assert cost <= budget
        assert loss >= brute_force(list(layers.values()), budget) - 1e-12
        if budget - largest >= 4:  # the last step saves at most as much more than it had to
            assert loss <= brute_force(list(layers.values()), budget - largest) + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_the_water_level_is_the_brute_force_on_convex_curves(seed: int) -> None:
    """With steps of one cost and losses that grow faster and faster the greedy choice is the best at every budget."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for k in range(4):
        steps = torch.rand(5, generator=generator, dtype=torch.float64).sort().values.cumsum(0).tolist()
        lost = [-np.expm1(-step) for step in steps]
        layers[str(k)] = [Option("a", (6 - n,), 6.0 - n, loss) for n, loss in enumerate([0.0, *lost])]
    for budget in range(4, 25):
        loss = sum(one.loss for one in spend(layers, budget).values())
        assert loss == pytest.approx(brute_force(list(layers.values()), budget), abs=1e-12)


def test_a_budget_that_cannot_be_met_quotes_the_least() -> None:
    with pytest.raises(BudgetError, match="least possible is 3") as caught:
        spend({"a": [Option("dense", (), 9, 0.0), Option("a", (1,), 3, 0.5)]}, 2)
    assert caught.value.least == 3


def test_an_option_that_costs_more_than_the_dense_layer_is_never_taken() -> None:
    options = [Option("dense", (), 9, 0.0), Option("a", (1,), 12, 0.5)]
    assert spend({"a": options}, 20)["a"].form == "dense"
    with pytest.raises(BudgetError):
        spend({"a": options}, 8)


def test_few_ranks_are_considered_of_large_layers() -> None:
    assert rank_grid(0) == []
    assert len(rank_grid(4096)) < 200
