"""All families of compression on one network at equal bytes of a file: accuracy, MACs and measured latency.

One dense network is trained; then each family makes a network whose file, with values in float16, has at most a share
of the bytes of the dense one in float32, and trains as long again. How far a family goes (weights to prune, clusters,
bits, widths, ranks) is what just fits, found by writing files of the dense network's weights before the training; a
family that can't get so small has no row. What is tested is the network of the file. Combinations stand below: the best
one is that of the least error on validation images. Controls: the dense network trained as long again, and the narrow
student alone. A student trains from the beginning, for as many epochs as both trainings of the others. The teacher of
those that are taught is the dense network, trained on.

Latency: a batch of 32, in turns, relative to the dense network; MACs do not count zeros of pruned weights as saved.

    python benchmarks/families.py --figure families.png               # a small network, 10,000 MNIST images
    python benchmarks/families.py --dataset cifar10 --epochs 12       # ResNet-20
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _families import COMBINATIONS, CONTROLS, FAMILIES, SHAPES, WIDTH, Bench, Family, untrained
from _fitting import bytes_of, fitting
from _support import Found, Setting, data_of, trainer
from lightning.pytorch import LightningModule
from mnist_pruning import silence
from rich.console import Console
from torch import nn

from lightning_compress import (
    load_compressed,
    save_compressed,
)
from lightning_compress.baselines import TensorLoader
from lightning_compress.measure.footprint import compare_latency
from lightning_compress.measure.macs import count_macs
from lightning_compress.report.figure import new_figure, tidy


def error(module: LightningModule, part: TensorLoader, setting: Setting) -> float:
    """Error in per cent."""
    return 100 * (1 - trainer(setting, 1).test(module, part, verbose=False)[0]["test_acc"])


def as_in_its_file(module: LightningModule) -> int:
    """Write the file, load it into the module, and return its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.lcz"
        size = save_compressed(module, path, half=True).bytes
        load_compressed(path, module)
    return size


def one_seed(setting: Setting, shares: Sequence[float], chosen: Mapping[str, Family], found: Found) -> None:
    held = 5000 if setting.dataset == "mnist" else 4000
    data = data_of(setting, val_size=(60_000 if setting.dataset == "mnist" else 20_000) - (setting.images or 0))
    data.setup()
    whole_val, test = data.val_dataloader(), data.test_dataloader()
    assert isinstance(whole_val, TensorLoader)
    val = TensorLoader(whole_val.inputs[:held], whole_val.targets[:held], batch_size=500)

    start = Bench(setting, data, untrained(setting), 0)
    start.tuned(start.dense)
    whole = bytes_of(start.dense, half=False)
    again = start.copy()
    start.tuned(again)
    budgets = [int(share * whole) for share in sorted(shares)]
    narrowest = [fitting(one, start.untrained, list(range(1, WIDTH))) for one in budgets]
    widths = tuple(sorted({one for one in narrowest if one is not None}))
    print(f"seed {setting.seed}: {whole:,} bytes dense; narrow networks of width {widths}", flush=True)

    x = torch.zeros(32, *SHAPES[setting.dataset])
    ways: dict[str, tuple[nn.Module, torch.Tensor]] = {}
    measured: dict[tuple[str, str], dict[str, float]] = {}

    def measure(title: str, name: str, module: LightningModule, size: int) -> None:
        errors = {f"{kind} error": error(module, part, setting) for kind, part in (("test", test), ("val", val))}
        measured[title, name] = errors | {"bytes": size, "MMACs": count_macs(module.eval(), x)[0] / 1e6}
        ways[f"{title}|{name}"] = module, x
        print(f"{title}: {name} {errors['test error']:.2f} %, {size:,} bytes", flush=True)

    for budget, share in zip(budgets, sorted(shares), strict=True):
        title = f"at most 1/{1 / share:.0f} of the dense network's bytes"
        for name, module in (("dense", start.dense), ("dense, trained on", again)):
            measure(title, name, module, whole)
        for name, family in chosen.items():
            small = family(replace(start, bytes=budget, teacher=again, widths=widths))
            if small is not None:
                size = as_in_its_file(small)
                measure(title, name, small, size)
    seconds = compare_latency(ways, repeats=5 if setting.quick else 30)
    for (title, name), numbers in measured.items():
        latency = seconds[f"{title}|{name}"] / seconds[f"{title}|dense"]
        found.add(title, name, **numbers, latency=latency)


def name_the_best(found: Found, console: Console) -> None:
    for title, rows in found.tables.items():

        def least(names: Mapping[str, Family], rows: Any = rows) -> str | None:
            there = [name for name in names if name in rows]
            return min(there, key=lambda name: statistics.median(rows[name]["val error"]), default=None)

        for kind, names in (("family", FAMILIES), ("combination", COMBINATIONS)):
            if (best := least(names)) is not None:
                error = statistics.median(rows[best]["test error"])
                console.print(f"{title}: best {kind} by validation: {best}, {error:.2f} % in the test")


def draw(found: Found, path: Path) -> None:
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    tidy(axes)
    names = [*FAMILIES, *COMBINATIONS, *CONTROLS]
    for name in names:
        points = [
            (statistics.median(row["bytes"]), statistics.median(row["test error"]))
            for rows in found.tables.values()
            if (row := rows.get(name)) is not None
        ]
        if points:
            style = "-" if name in FAMILIES else "--" if name in COMBINATIONS else ":"
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linestyle=style, label=name)
    dense = next(iter(found.tables.values()))["dense"]["test error"]
    axes.axhline(statistics.median(dense), color="#5c6670", linewidth=0.8, label="dense")
    axes.set(xscale="log", xlabel="bytes of the file", ylabel="error on the test images (%)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = FAMILIES | COMBINATIONS | CONTROLS
    parser.add_argument("--dataset", choices=list(SHAPES), default="mnist")
    parser.add_argument("--data", help="the folder of its files; by default data/mnist or data/cifar10")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--shares", type=float, nargs="+", default=[1 / 8, 1 / 13, 1 / 32], help="of the dense bytes")
    parser.add_argument("--epochs", type=int, default=8, help="of the dense network, and of every family after it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--precision", default="32-true", help="of training; bf16-mixed may be faster")
    parser.add_argument("--only", nargs="+", choices=list(everything), metavar="NAME", help=", ".join(everything))
    parser.add_argument("--figure", type=Path, help="write a PNG of the errors against the bytes")
    parser.add_argument("--json", type=Path, help="write the numbers of all seeds here as well")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")
    arguments = parser.parse_args()
    silence()
    chosen = {name: everything[name] for name in arguments.only or everything}
    console, found = Console(width=120), Found()
    for seed in arguments.seeds:
        setting = Setting(
            dataset=arguments.dataset, folder=arguments.data or f"data/{arguments.dataset}",
            epochs=1 if arguments.quick else arguments.epochs, batch=arguments.batch, lr=arguments.lr, seed=seed,
            precision=arguments.precision, images=arguments.images, quick=arguments.quick,
        )  # fmt: skip
        one_seed(setting, arguments.shares, chosen, found)
    found.show(console, arguments.json)
    name_the_best(found, console)
    if arguments.figure is not None:
        draw(found, arguments.figure)
    console.print(f"load after: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
