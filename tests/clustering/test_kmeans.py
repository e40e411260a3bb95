from __future__ import annotations

import itertools
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from lightning_compress.clustering import intervals
from lightning_compress.clustering.kmeans import assign, kmeans


def cost(values: Tensor, means: Tensor) -> float:
    """Every value to its nearest mean, by comparing all of them."""
    return float((values.double().reshape(-1, 1) - means.reshape(1, -1)).square().min(dim=1).values.sum())


def least_cost_of_any_partition(values: np.ndarray, k: int) -> float:
    """All ways to put n values into k clusters, intervals or not."""
    labels = np.array(list(itertools.product(range(k), repeat=len(values))))
    total = np.zeros(len(labels))
    for cluster in range(k):
        inside = labels == cluster
        n = inside.sum(1)
        mean = (inside * values).sum(1) / np.maximum(n, 1)
        total += (inside * (values - mean[:, None]) ** 2).sum(1)
    return float(total.min())


def least_cost_of_any_intervals(values: np.ndarray, k: int) -> float:
    """The textbook dynamic program, O(k n^2), with costs that are summed up anew for every interval."""
    x = np.sort(values)
    n = len(x)
    price = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        for j in range(i + 1, n + 1):
            price[i, j] = ((x[i:j] - x[i:j].mean()) ** 2).sum()
    best = price[0]
    for _ in range(k - 1):
        best = np.array([min(best[i], (best[:i] + price[:i, i]).min(initial=np.inf)) for i in range(n + 1)])
    return float(best[n])


def samples(kind: str, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    return {
        "normal": x * 0.05,
        "heavy": x / torch.rand(n, generator=generator, dtype=torch.float64),
        "ties": (x * 4).round() / 4,
        "two groups": torch.where(x > 0, x + 100.0, x),
        "outliers": torch.cat([x[: n - 3] * 0.01, torch.tensor([-1e6, 3e3, 1e5], dtype=torch.float64)]),
        "far from zero": x * 0.01 + 1000.0,
        "pruned": torch.where(x.abs() < 1.0, 0.0, x),
    }[kind]


KINDS = ["normal", "heavy", "ties", "two groups", "outliers", "far from zero", "pruned"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 2), (9, 3), (12, 2), (7, 4)])
def test_no_partition_is_better(kind: str, n: int, k: int) -> None:
    for seed in range(5):
        values = samples(kind, max(n, 4), seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct values than clusters
            means = kmeans(values, k)
        least = least_cost_of_any_partition(values.numpy(), k)
        assert cost(values, means) <= least * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(60, 5), (150, 16), (300, 3), (300, 40)])
def test_no_intervals_are_better(kind: str, n: int, k: int) -> None:
    values = samples(kind, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = kmeans(values, k)
    least = least_cost_of_any_intervals(values.numpy(), k)
    assert cost(values, means) <= least * (1 + 1e-9) + 1e-9


def test_linear_and_density_may_be_worse_and_never_better() -> None:
    values = samples("heavy", 300)
    least = least_cost_of_any_intervals(values.numpy(), 16)
    linear, density = (cost(values, kmeans(values, 16, init=init)) for init in ("linear", "density"))
    assert min(linear, density) >= least * (1 - 1e-9)
    assert max(linear, density) > 1.5 * least


def test_linear_and_density_end_where_lloyd_by_hand_does() -> None:
    x = samples("normal", 400)
    starts = {
        "linear": torch.linspace(float(x.min()), float(x.max()), 6, dtype=torch.float64),
        "density": x.sort().values[((torch.arange(6) + 0.5) / 6 * 400).long()],
    }
    for init, means in starts.items():
        for _ in range(600):
            labels = (x[:, None] - means[None]).abs().argmin(1)
            means = torch.stack([x[labels == j].mean() if (labels == j).any() else means[j] for j in range(6)])
        assert cost(x, kmeans(x, 6, init=init)) == pytest.approx(cost(x, means), rel=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers"])
def test_at_most_the_error_of_scikit_learn(kind: str) -> None:
    values = samples(kind, 30_000)
    peer = KMeans(16, n_init=3, random_state=0).fit(values.numpy().reshape(-1, 1))
    theirs = cost(values, torch.from_numpy(peer.cluster_centers_.ravel()))
    assert cost(values, kmeans(values, 16)) <= theirs * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [4, 64])
def test_chunks_change_next_to_nothing(kind: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks with fewer cells, and few bins, against one chunk."""
    parts = [one.float() for one in samples(kind, 60_000).split([1, 25_000, 0, 34_999])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = kmeans(parts, k)
        monkeypatch.setattr(intervals, "_CHUNK", 13_000)
        monkeypatch.setattr(intervals, "_CELLS", 4000)
        monkeypatch.setattr(sys.modules["lightning_compress.clustering.kmeans"], "_BINS", 2000)
        rough = kmeans(parts, k)
    together = torch.cat(parts)
    assert len(rough) <= k
    assert cost(together, rough) <= cost(together, whole) * 1.01 + 1e-9


def test_more_clusters_than_the_dynamic_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    values = samples("normal", 20_000)
    exact = cost(values, kmeans(values, 60))
    monkeypatch.setattr(sys.modules["lightning_compress.clustering.kmeans"], "_DP", 50)
    assert exact <= cost(values, kmeans(values, 60)) <= 1.05 * exact


def test_order_shape_and_grouping_do_not_matter() -> None:
    values = samples("heavy", 5000).float()
    means = kmeans(values, 32)
    shuffled = values[torch.randperm(5000, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(kmeans(shuffled.view(50, 100).t(), 32), means)
    assert torch.equal(kmeans(list(values.split(777)), 32), means)
    assert torch.equal(kmeans(values.requires_grad_(), 32), means)


def test_zeros_have_their_own_mean() -> None:
    values = torch.tensor([0.0, -0.0, 1e-30, -1.0, -1.2, 0.0, 3.0])
    means = kmeans(values, 2, keep_zero=True)
    assert means[0] == 0.0
    assert means[1:].tolist() == pytest.approx([-2.2 / 3, 3.0])
    assert assign(values, means, keep_zero=True).tolist() == [0, 0, 1, 1, 1, 0, 2]
    assert torch.equal(means[1:], kmeans(values[values != 0], 2))
    assert kmeans(torch.ones(3), 1, keep_zero=True).tolist() == [0.0, 1.0]
    plain = kmeans(values, 2)
    assert plain.tolist() == pytest.approx([-2.2 / 6, 3.0])


def test_an_outlier_does_not_drown_the_others() -> None:
    values = torch.cat([torch.tensor([-1e30]), torch.full((500,), 0.1), torch.full((500,), 0.3)])
    assert kmeans(values, 3).float().tolist() == torch.tensor([-1e30, 0.1, 0.3]).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type(dtype: torch.dtype) -> None:
    values = samples("normal", 2000).to(dtype)
    means = kmeans(values, 8)
    assert means.dtype == torch.float64
    nearest = (values.double()[:, None] - means[None]).abs().argmin(1)
    assert torch.equal(assign(values, means).long(), nearest)


# ---------------------------------------------------------------------- the nearest mean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 3, 17, 256, 257])
def test_every_value_gets_its_nearest_mean(kind: str, k: int) -> None:
    means = samples(kind, max(k, 4), seed=7).unique()[:k]
    middles = (means[1:] + means[:-1]) / 2
    edges = torch.cat([middles, torch.nextafter(middles, torch.tensor(-torch.inf, dtype=torch.float64))])
    far = torch.tensor([-1e300, 1e300], dtype=torch.float64)
    values = torch.cat([samples(kind, 3000), means, edges, far])
    index = assign(values, means)
    by_hand = torch.searchsorted(middles, values, right=True)
    assert torch.equal(index.long(), by_hand)
    assert index.dtype == (torch.uint8 if len(means) <= 256 else torch.int16)


def test_means_of_very_unequal_distances_in_float32() -> None:
    means = torch.tensor([-3e4, 0.001, 0.002, 0.0020001, 0.003, 5e8], dtype=torch.float64)
    values = torch.cat([torch.rand(10_000) * 0.004, torch.tensor([-1e38, 1e38, 0.0, -2e4, 2e8, 3e8])])
    by_hand = torch.searchsorted((means[1:] + means[:-1]) / 2, values.double(), right=True)
    assert torch.equal(assign(values, means).long(), by_hand)


def test_no_values_at_all() -> None:
    with pytest.warns(UserWarning, match="values: every entry is zero, so all of them count as pruned"):
        means = kmeans(torch.zeros(4), 2, keep_zero=True)
    assert means.tolist() == [0.0]
    assert assign(torch.zeros(4), means, keep_zero=True).tolist() == [0, 0, 0, 0]
    assert assign(torch.zeros(0, 3), torch.tensor([1.0])).shape == (0, 3)


# ---------------------------------------------------------------------- bad input


def test_more_clusters_than_distinct_values_are_the_values() -> None:
    values = torch.tensor([0.5, -1.0, 0.5, 2.0])
    with pytest.warns(UserWarning, match=r"fc\.weight: 16 clusters were asked for, .* 3 distinct values; "):
        means = kmeans(values, 16, names=["fc.weight"])
    assert means.tolist() == [-1.0, 0.5, 2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kmeans(values, 3).tolist() == [-1.0, 0.5, 2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_name_their_tensor(bad: float) -> None:
    broken = torch.randn(6)
    broken[2:4] = bad
    with pytest.raises(
        ValueError,
        match=r"NaN or infinite: 2 of 6 in fc2\.weight\. They must be finite",
    ):
        kmeans([torch.randn(5), broken], 2, names=["fc1.weight", "fc2.weight"])


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"n_clusters must be 1 or more; got 0 for fc\.weight"):
        kmeans(torch.randn(4), 0, names=["fc.weight"])
    with pytest.raises(ValueError, match="init must be 'optimal', 'linear' or 'density'; got 'forgy'"):
        kmeans(torch.randn(4), 2, init="forgy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"values has dtype torch\.int64; k-means takes torch\.float16"):
        kmeans(torch.arange(4), 2)
