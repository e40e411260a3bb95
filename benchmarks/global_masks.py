"""Global magnitude masks, 90 % dropped: ours against torch.nn.utils.prune and against concatenate + kthvalue.

Times are medians of runs in one process, the methods taking turns so that they see the same machine; the CPU time tells
how far a busy machine disturbed them. Peaks are of the resident memory, one fresh process each, above what was resident
with the weights in place; the masks themselves are in it.

    python benchmarks/global_masks.py --sizes 1e6 1e7 1e8 1e9 --peer-size 1e8 --repeats 3
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_compress.core.keep_largest import keep_largest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.resident import can_measure, forget_peak, peak, resident

AMOUNT = 0.9


def layers(size: int) -> list[nn.Module]:
    """Ten linear layers with `size` normal weights together."""
    generator = torch.Generator().manual_seed(0)
    found: list[nn.Module] = []
    for _ in range(10):
        layer = nn.Linear(1000, size // 10_000, bias=False, device="meta").to_empty(device="cpu")
        nn.init.normal_(layer.weight, generator=generator)
        found.append(layer)
    return found


def ours(modules: list[nn.Module]) -> list[Tensor]:
    weights = [module.weight for module in modules]
    return keep_largest(weights, round(AMOUNT * sum(weight.numel() for weight in weights)), absolute=True)


def torch_prune(modules: list[nn.Module]) -> list[Tensor]:
    prune.global_unstructured([(module, "weight") for module in modules], prune.L1Unstructured, amount=AMOUNT)
    return [module.weight_mask for module in modules]


@torch.no_grad()
def kthvalue(modules: list[nn.Module]) -> list[Tensor]:
    magnitudes = torch.cat([module.weight.flatten() for module in modules]).abs_()
    threshold = magnitudes.kthvalue(round(AMOUNT * len(magnitudes))).values
    return [module.weight.abs() > threshold for module in modules]


METHODS: dict[str, Callable[[list[nn.Module]], list[Tensor]]] = {
    "prune.global_unstructured": torch_prune,
    "concatenate + kthvalue": kthvalue,
    "keep_largest": ours,
}


def timed(method: str, modules: list[nn.Module]) -> tuple[float, float, list[Tensor]]:
    """Return seconds, seconds of CPU and the masks of one run."""
    gc.collect()
    start, cpu_start = time.perf_counter(), time.process_time()
    masks = METHODS[method](modules)
    return time.perf_counter() - start, time.process_time() - cpu_start, masks


def peak_bytes(method: str, size: int) -> int:
    """Return how far one run raises the resident memory; to be called in a process of its own, on Linux."""
    METHODS[method](layers(10_000))  # what a first call loads stays out of the count
    modules = layers(size)
    forget_peak()
    before = resident()
    masks = METHODS[method](modules)
    assert masks
    return peak() - before


def in_a_fresh_process(method: str, size: int) -> int | None:
    if not can_measure():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_bytes, (method, size))


def megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:,.0f} MB"


def compare(size: int, repeats: int) -> Table:
    table = Table(title=f"Global magnitude masks, {size:,} weights in ten layers, {AMOUNT:.0%} dropped")
    for column in ("method", "time", "CPU time", "times ours", "peak above weights"):
        table.add_column(column, justify="left" if column == "method" else "right")
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    cpu_seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(repeats):
        reference: list[Tensor] = []
        for method in reversed(METHODS):  # ours first, and fresh modules for each: prune changes them
            wall, cpu, masks = timed(method, layers(size))
            seconds[method].append(wall)
            cpu_seconds[method].append(cpu)
            reference = reference or masks
            differing = sum(int((mask.bool() != own).sum()) for mask, own in zip(masks, reference, strict=True))
            assert differing < 100, f"{method} differs in {differing} entries, more than ties at the threshold explain"
    for method in METHODS:
        wall = statistics.median(seconds[method])
        table.add_row(
            method,
            f"{wall:.3f} s",
            f"{statistics.median(cpu_seconds[method]):.3f} s",
            f"{wall / statistics.median(seconds['keep_largest']):.1f}",
            megabytes(in_a_fresh_process(method, size)),
        )
    return table


def growth(sizes: list[int], repeats: int) -> Table:
    table = Table(title="keep_largest: growth with the number of weights")
    for column in ("weights", "time", "CPU time", "ns per weight", "peak above weights and masks"):
        table.add_column(column, justify="right")
    for size in sizes:
        modules = layers(size)
        timed("keep_largest", modules)  # the first run is slower
        runs = [timed("keep_largest", modules)[:2] for _ in range(repeats)]
        wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
        del modules
        peak = in_a_fresh_process("keep_largest", size)
        table.add_row(
            f"{size:,}",
            f"{wall * 1e3:,.1f} ms",
            f"{cpu * 1e3:,.1f} ms",
            f"{wall / size * 1e9:.2f}",
            megabytes(None if peak is None else peak - size),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="*", default=[1e6, 1e7, 1e8, 1e9], help="of the growth table")
    parser.add_argument("--peer-size", type=float, default=1e8, help="of the comparison; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(f"torch {torch.__version__}, {arguments.threads} threads, load before: {os.getloadavg()[0]:.1f}")
    if arguments.peer_size:
        console.print(compare(round(arguments.peer_size), arguments.repeats))
    if arguments.sizes:
        console.print(growth([round(size) for size in arguments.sizes], arguments.repeats))
    console.print(f"load after: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
