"""How fast is the 1-D k-means, and how good? Ours against scikit-learn, and its three beginnings against each other.

Times include the index of every weight; CPU time is what a busy machine disturbs less. The error is the mean squared
one, over the weights' variance.

    python benchmarks/kmeans.py                    # 10 million weights, k = 16 and 256; scikit-learn at k = 16
    python benchmarks/kmeans.py --large            # 100 million as well: time per weight
    python benchmarks/kmeans.py --inits            # optimal, linear, density at k = 4 .. 256
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from torch import Tensor

from lightning_compress.clustering.kmeans import Init, assign, kmeans


def weights(n: int, kind: str = "normal") -> Tensor:
    """Normal weights of a dense layer, or the 8 % largest of them, which pruning leaves."""
    generator = torch.Generator().manual_seed(0)
    if kind == "normal":
        return torch.randn(n, generator=generator) * 0.05
    x = torch.randn(n * 13, generator=generator) * 0.05
    return x[x.abs() > 0.0875][:n].clone()


def error(values: Tensor, means: Tensor, index: Tensor) -> float:
    chunks = zip(values.split(2**20), index.split(2**20), strict=True)
    return sum(float((v.double() - means[i.long()]).square().sum()) for v, i in chunks) / (
        len(values) * float(values.double().var())
    )


def timed(run: Callable[[], tuple[Tensor, Tensor]], rounds: int) -> tuple[float, float, Tensor, Tensor]:
    """Median wall-clock and CPU seconds, and the result."""
    wall, cpu = [], []
    for _ in range(rounds):
        start = time.perf_counter(), time.process_time()
        means, index = run()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return statistics.median(wall), statistics.median(cpu), means, index


def ours(values: Tensor, k: int, init: Init = "optimal") -> tuple[Tensor, Tensor]:
    means = kmeans(values, k, init=init)
    return means, assign(values, means)


def scikit_learn(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    peer = KMeans(k, n_init=1, random_state=0).fit(values.numpy().reshape(-1, 1))
    return torch.from_numpy(peer.cluster_centers_.ravel()).double(), torch.from_numpy(peer.labels_)


def speed(n: int, large: bool, rounds: int) -> Table:
    table = Table("weights", "k", "method", "wall s", "CPU s", "error / variance")
    sizes = [(n, 16), (n, 256)] + ([(10 * n, 16), (10 * n, 256)] if large else [])
    for size, k in sizes:
        values = weights(size)
        wall, cpu, *found = timed(lambda v=values, c=k: ours(v, c), rounds if size == n else 1)  # type: ignore[misc]
        table.add_row(f"{size:,}", str(k), "ours", f"{wall:.3f}", f"{cpu:.3f}", f"{error(values, *found):.6e}")
    values = weights(n)
    wall, cpu, *peer = timed(lambda: scikit_learn(values, 16), 1)
    row = (f"{wall:.1f}", f"{cpu:.1f}", f"{error(values, *peer):.6e}")
    table.add_row(f"{n:,}", "16", "scikit-learn, n_init=1", *row)
    return table


def inits(n: int) -> Table:
    table = Table("weights", "k", *[f"{init}: error / variance (used)" for init in get_args(Init)], "linear / optimal")
    for kind in ("normal", "the 8 % largest"):
        values = weights(n, kind)
        for k in (4, 8, 16, 32, 64, 128, 256):
            found = {init: ours(values, k, init) for init in get_args(Init)}
            errors = {init: error(values, *one) for init, one in found.items()}
            cells = [f"{errors[init]:.3e} ({len(found[init][0])})" for init in found]
            table.add_row(kind, str(k), *cells, f"{errors['linear'] / errors['optimal']:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--inits", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    Console().print(
        inits(1_000_000) if arguments.inits else speed(arguments.weights, arguments.large, arguments.rounds)
    )


if __name__ == "__main__":
    main()
