"""All families of compression on one network at equal bytes of a file: accuracy, MACs and measured latency.

One dense network is trained; then each family makes a network whose file, with values in float16, has at most a share
of the bytes of the dense one in float32, and trains as long again. How far a family goes (weights to prune, clusters,
bits, widths, ranks) is what just fits, found by writing files of the dense network's weights before the training; a
family that can't get so small has no row. What is tested is the network of the file. Combinations stand below: the best
one is that of the least error on validation images. Controls: the dense network trained as long again, and the narrow
student alone. A student trains from the beginning, for as many epochs as both trainings of the others.

Latency: a batch of 32, in turns, relative to the dense network; MACs do not count zeros of pruned weights as saved.

    python benchmarks/families.py --figure families.png               # a small network, 10,000 MNIST images
    python benchmarks/families.py --dataset cifar10 --epochs 12       # ResNet-20
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from _support import Found, Setting, classifier, data_of, fit, initial, trainer
from lightning.pytorch import Callback, LightningModule
from mnist_pruning import silence
from rich.console import Console
from torch import nn

from lightning_compress import (
    DistillationModule,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    SlimmableWidth,
    WeightClusteringCallback,
    load_compressed,
    save_compressed,
)
from lightning_compress.baselines import Classifier, ResNet20, TensorLoader
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.clustering.kmeans import kmeans
from lightning_compress.core.select import select_parameters
from lightning_compress.measure.footprint import compare_latency
from lightning_compress.measure.macs import count_macs
from lightning_compress.report.figure import new_figure, tidy

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
WIDTH = 16
SLACK = 0.98  # of a budget, before the training: trained weights take other bytes than the dense ones
Choice = TypeVar("Choice", int, float)


def conv_net(width: int) -> nn.Sequential:
    """Five 3x3 convolutions with batch norm and ReLU, two poolings, and a linear layer on the means of the channels."""
    net, before = nn.Sequential(), 1
    for number, outputs in enumerate((width, 2 * width, 2 * width, 4 * width, 4 * width), start=1):
        net.add_module(f"conv{number}", nn.Conv2d(before, outputs, 3, padding=1, bias=False))
        net.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
        net.add_module(f"relu{number}", nn.ReLU())
        if number in (1, 3):
            net.add_module(f"pool{number}", nn.MaxPool2d(2))
        before = outputs
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(before, 10))
    return net


def network(dataset: str, width: int = WIDTH) -> nn.Module:
    return conv_net(width) if dataset == "mnist" else ResNet20(width=width)


@dataclass(frozen=True)
class Bench:
    """What every family gets: the dense network, its data, and a budget.

    Attributes:
        bytes: The most bytes of a file.
        widths: Channels of the first layer with which a dense network fits into each budget, the smallest first.
    """

    setting: Setting
    data: ImageData
    dense: Classifier
    bytes: int
    widths: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.setting.dataset]

    def copy(self) -> Classifier:
        return copy.deepcopy(self.dense).train()

    def tuned(self, module: LightningModule, *callbacks: Callback, epochs: int | None = None) -> LightningModule:
        fit(module, self.data, self.setting, epochs=epochs, callbacks=callbacks)
        return module

    def untrained(self, width: int) -> Classifier:
        make = partial(network, self.setting.dataset, width)
        return classifier(initial(make, self.setting), self.setting, self.shape)


def bytes_of(module: nn.Module, *, half: bool = True) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save_compressed(module, Path(folder) / "a.lcz", half=half).bytes


def fitting(bench: Bench, make: Callable[[Choice], nn.Module], choices: Sequence[Choice]) -> Choice | None:
    """Return the last choice, of those in the order of their bytes, whose network fits; None: not even the first."""
    low, high = -1, len(choices) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_of(make(choices[middle])) <= SLACK * bench.bytes:
            low = middle
        else:
            high = middle - 1
    return None if low < 0 else choices[low]


# ------------------------------------------------------------------ weights as a technique would leave them, untrained


@torch.no_grad()
def pruned_copy(network: nn.Module, amount: float) -> nn.Module:
    """Zero the smallest weights of all layers."""
    network = copy.deepcopy(network)
    weights = list(select_parameters(network).values())
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = magnitudes.sort().values[min(int(amount * len(magnitudes)), len(magnitudes) - 1)]
    for weight in weights:
        weight.masked_fill_(weight.abs() < threshold, 0.0)
    return network


@torch.no_grad()
def clustered_copy(network: nn.Module, k: int) -> nn.Module:
    """Give the weights of each layer k values, zeros apart."""
    network = copy.deepcopy(network)
    for weight in select_parameters(network).values():
        values = torch.cat([torch.zeros(1), kmeans([weight], k, keep_zero=True).float()]).sort().values
        nearest = torch.bucketize(weight, (values[1:] + values[:-1]) / 2)
        weight.copy_(torch.where(weight == 0, 0.0, values[nearest]))
    return network


def distance(network: nn.Module, other: nn.Module) -> float:
    """The sum of the squares of what all weights have lost."""
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    return sum(float((a - b).square().sum()) for a, b in pairs)


AMOUNTS = [1 - 0.96**step for step in range(130, 0, -1)]  # of the weights, from 99.5 % on downwards
CLUSTERS = [2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256]


# ------------------------------------------------------------------ the families; None: it can't get so small


def pruned(bench: Bench) -> LightningModule | None:
    amount = fitting(bench, lambda amount: pruned_copy(bench.dense, amount), AMOUNTS)
    return None if amount is None else bench.tuned(bench.copy(), IterativePruningCallback(amount, every_n_steps=20))


def clustered(bench: Bench) -> LightningModule | None:
    k = fitting(bench, lambda k: clustered_copy(bench.dense, k), CLUSTERS)
    return None if k is None else bench.tuned(bench.copy(), WeightClusteringCallback(k))


def quantized(bench: Bench) -> LightningModule | None:
    # A grid of b bits has 2^b - 1 values, and clusters of as many take as many bits, or fewer.
    bits = fitting(bench, lambda bits: clustered_copy(bench.dense, 2**bits - 1), [2, 3, 4, 5, 6, 7, 8])
    if bits is None:
        return None
    return bench.tuned(bench.copy(), QuantizationAwareTrainingCallback(bits, activation_bits=None))


def narrow(bench: Bench) -> LightningModule | None:
    width = fitting(bench, bench.untrained, list(range(1, WIDTH)))
    return None if width is None else bench.tuned(bench.untrained(width), epochs=2 * bench.setting.epochs)


def distilled(bench: Bench) -> LightningModule | None:
    width = fitting(bench, bench.untrained, list(range(1, WIDTH)))
    if width is None:
        return None
    student = bench.untrained(width)
    bench.tuned(taught(student, bench), epochs=2 * bench.setting.epochs)
    return student


def taught(student: Classifier, bench: Bench) -> DistillationModule:
    return DistillationModule(student, copy.deepcopy(bench.dense), temperature=4.0, alpha=0.9, network="network")


_slimmable: dict[int, SlimmableWidth] = {}  # one training for all budgets of a seed


def slimmed(bench: Bench) -> LightningModule | None:
    width = fitting(bench, bench.untrained, list(range(1, WIDTH)))
    if width is None:
        return None
    if bench.setting.seed not in _slimmable:
        widths = tuple(n / WIDTH for n in bench.widths)
        wrapper = SlimmableWidth(bench.copy(), (*widths, 1.0), network="network", weights="equal")
        bench.tuned(wrapper)
        _slimmable[bench.setting.seed] = wrapper
    thin = _slimmable[bench.setting.seed].extract(width / WIDTH)
    return classifier(thin, bench.setting, bench.shape)


# ------------------------------------------------------------------ combinations


def few_values(bench: Bench) -> tuple[float, int] | None:
    """Return the amount to prune and the clusters that fit and lose least of the dense network's weights."""
    found = []
    for k in (3, 4, 6, 8, 16, 32):
        make = _pruned_and_clustered(bench, k)
        amount = fitting(bench, make, AMOUNTS)
        if amount is not None:
            found.append((distance(bench.dense, make(amount)), amount, k))
    return min(found)[1:] if found else None


def _pruned_and_clustered(bench: Bench, k: int) -> Callable[[float], nn.Module]:
    return lambda amount: clustered_copy(pruned_copy(bench.dense, amount), k)


def in_two_parts(bench: Bench, module: LightningModule, amount: float, k: int) -> None:
    """Prune in the first half of the epochs, and cluster what is left at two thirds."""
    epochs = bench.setting.epochs
    pruning = IterativePruningCallback(amount, end_epoch=epochs / 2, every_n_steps=20)
    bench.tuned(module, pruning, WeightClusteringCallback(k, start_epoch=2 * epochs / 3))


def pruned_clustered(bench: Bench) -> LightningModule | None:
    chosen = few_values(bench)
    if chosen is None:
        return None
    module = bench.copy()
    in_two_parts(bench, module, *chosen)
    return module


def pruned_clustered_distilled(bench: Bench) -> LightningModule | None:
    chosen = few_values(bench)
    if chosen is None:
        return None
    module = bench.copy()
    in_two_parts(bench, taught(module, bench), *chosen)
    return module


def slimmed_clustered(bench: Bench) -> LightningModule | None:
    """A student of half the width, taught by the dense network, then pruned and clustered with its help."""
    student = bench.untrained(WIDTH // 2)
    bench.tuned(taught(student, bench))
    half = replace(bench, dense=student)
    chosen = few_values(half)
    if chosen is None:
        return None
    in_two_parts(bench, taught(student, bench), *chosen)
    return student


Family = Callable[[Bench], LightningModule | None]
FAMILIES: dict[str, Family] = {
    "pruned": pruned,
    "clustered": clustered,
    "quantized": quantized,
    "distilled": distilled,
    "slimmed": slimmed,
}
COMBINATIONS: dict[str, Family] = {
    "pruned + clustered": pruned_clustered,
    "pruned + clustered, taught": pruned_clustered_distilled,
    "half as wide + pruned + clustered, taught": slimmed_clustered,
}
CONTROLS: dict[str, Family] = {"narrow, alone": narrow}


# ------------------------------------------------------------------ tables


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

    start = Bench(
        setting,
        data,
        classifier(initial(partial(network, setting.dataset), setting), setting, SHAPES[setting.dataset]),
        0,
    )
    start.tuned(start.dense)
    whole = bytes_of(start.dense, half=False)
    again = start.tuned(start.copy())
    budgets = [int(share * whole) for share in sorted(shares)]
    narrowest = [fitting(replace(start, bytes=one), start.untrained, list(range(1, WIDTH))) for one in budgets]
    widths = tuple(sorted({one for one in narrowest if one is not None}))
    print(f"seed {setting.seed}: {whole:,} bytes dense; narrow networks of width {widths}", flush=True)

    x = torch.zeros(32, *SHAPES[setting.dataset])
    ways: dict[str, tuple[nn.Module, torch.Tensor]] = {}
    measured: dict[tuple[str, str], dict[str, float]] = {}

    def measure(title: str, name: str, module: LightningModule, size: int) -> None:
        errors = {f"{kind} error": error(module, part, setting) for kind, part in (("test", test), ("val", val))}
        measured[title, name] = errors | {"bytes": size, "MMACs": count_macs(module, x)[0] / 1e6}
        ways[f"{title}|{name}"] = module, x
        print(f"{title}: {name} {errors['test error']:.2f} %, {size:,} bytes", flush=True)

    for budget, share in zip(budgets, sorted(shares), strict=True):
        title = f"at most 1/{1 / share:.0f} of the dense network's bytes"
        for name, module in (("dense", start.dense), ("dense, trained on", again)):
            measure(title, name, module, whole)
        for name, family in chosen.items():
            small = family(replace(start, bytes=budget, widths=widths))
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
            return min(there, key=lambda name: sum(rows[name]["val error"]), default=None)

        for kind, names in (("family", FAMILIES), ("combination", COMBINATIONS)):
            if (best := least(names)) is not None:
                errors = rows[best]["test error"]
                console.print(
                    f"{title}: best {kind} by validation: {best}, {sum(errors) / len(errors):.2f} % on average"
                )


def draw(found: Found, path: Path) -> None:
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    tidy(axes)
    names = [*FAMILIES, *COMBINATIONS, *CONTROLS]
    for name in names:
        points = [
            (sum(row["bytes"]) / len(row["bytes"]), sum(row["test error"]) / len(row["test error"]))
            for rows in found.tables.values()
            if (row := rows.get(name)) is not None
        ]
        if points:
            style = "-" if name in FAMILIES else "--" if name in COMBINATIONS else ":"
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linestyle=style, label=name)
    dense = next(iter(found.tables.values()))["dense"]["test error"]
    axes.axhline(sum(dense) / len(dense), color="#5c6670", linewidth=0.8, label="dense")
    axes.set(xscale="log", xlabel="bytes of the file", ylabel="error on the test images (%)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(SHAPES), default="mnist")
    parser.add_argument("--data", help="the folder of its files; by default data/mnist or data/cifar10")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--shares", type=float, nargs="+", default=[1 / 8, 1 / 16, 1 / 32], help="of the dense bytes")
    parser.add_argument("--epochs", type=int, default=8, help="of the dense network, and of every family after it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--only", nargs="+", help="families, combinations and controls by name; by default all")
    parser.add_argument("--figure", type=Path, help="write a PNG of the errors against the bytes")
    parser.add_argument("--json", type=Path, help="write the numbers of all seeds here as well")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")
    arguments = parser.parse_args()
    silence()
    everything = FAMILIES | COMBINATIONS | CONTROLS
    chosen = {name: everything[name] for name in arguments.only or everything}
    console, found = Console(width=120), Found()
    for seed in arguments.seeds:
        setting = Setting(
            dataset=arguments.dataset, folder=arguments.data or f"data/{arguments.dataset}",
            epochs=1 if arguments.quick else arguments.epochs, batch=arguments.batch, lr=arguments.lr, seed=seed,
            images=arguments.images, quick=arguments.quick,
        )  # fmt: skip
        one_seed(setting, arguments.shares, chosen, found)
    found.show(console, arguments.json)
    name_the_best(found, console)
    if arguments.figure is not None:
        draw(found, arguments.figure)
    console.print(f"load after: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
