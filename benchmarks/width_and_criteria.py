"""Error against latency: ResNet-20, narrow, on 10,000 MNIST images; three criteria and group lasso, from one dense net.

Every variant starts from the same dense network and trains as long again. The criteria prune whole channel groups over
the first half and cut them out: the same fraction of every group (scope="layer"), so that criteria differ in nothing
but their choice; ", global" means scope="global" with cost="macs", which chooses the widths as well. Group lasso has
the first half to drive groups to zero, `shrink` takes these, and the second half recovers; its strength is such that
all its steps together can take so many times the median of the groups' norms, strength * sum of lr. What it reaches is
its own affair: compare points of the same latency. "random" is the floor, and the error is on the 10,000 test images.

    python benchmarks/width_and_criteria.py --root data/mnist --points points.json --figure width.png
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from mnist_pruning import silence
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_compress import GroupLassoCallback, IterativePruningCallback
from lightning_compress.baselines import MNIST, Classifier, ResNet20
from lightning_compress.channels.cut import shrink
from lightning_compress.channels.find import channel_groups
from lightning_compress.group_lasso.penalty import producer_groups
from lightning_compress.measure.footprint import compare_latency
from lightning_compress.measure.macs import count_macs
from lightning_compress.report.figure import new_figure, tidy

IMAGES, BATCH, SHAPE = 10_000, 64, (1, 28, 28)
LATENCY_BATCH = 32
GLOBAL = ", global"
LASSO = "group lasso"
Points = dict[str, list[tuple[float, float]]]  # of each variant: latency relative to the dense network's, and error
VARIANTS = ["random", "magnitude", "taylor", "obd", LASSO, f"magnitude{GLOBAL}", f"taylor{GLOBAL}"]


@dataclass(frozen=True)
class Setting:
    epochs: int
    lr: float
    seed: int
    root: str


def data(setting: Setting) -> MNIST:
    return MNIST(setting.root, batch_size=BATCH, val_size=60_000 - IMAGES, seed=setting.seed)


def trainer(epochs: int, callbacks: list[Callback]) -> Trainer:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        limit_val_batches=0,
        enable_model_summary=False,
        **silent,
    )


def train(module: LightningModule, setting: Setting, epochs: int, callbacks: list[Callback]) -> None:
    seed_everything(setting.seed, verbose=False)
    trainer(epochs, callbacks).fit(module, datamodule=data(setting))


def error(module: LightningModule, setting: Setting) -> float:
    return 100 * (1 - trainer(1, []).test(module, datamodule=data(setting), verbose=False)[0]["test_acc"])


def classifier(network: nn.Module, setting: Setting, **options: Any) -> Classifier:
    return Classifier(
        network, optimizer="sgd", lr=setting.lr, weight_decay=1e-4, input_shape=SHAPE, warmup=0.1, **options
    )


def by_criterion(dense: nn.Module, name: str, amount: float, setting: Setting) -> Classifier:
    module = classifier(copy.deepcopy(dense), setting)
    options: dict[str, Any] = {"criterion": name.removesuffix(GLOBAL)}
    pruning = IterativePruningCallback(
        amount,
        granularity="neuron",
        scope="global" if name.endswith(GLOBAL) else "layer",
        cost="macs",
        end_epoch=setting.epochs / 2,
        every_n_steps=20,
        shrink="on_fit_end",
        **options,
    )
    train(module, setting, setting.epochs, [pruning])
    return module


def by_group_lasso(dense: nn.Module, medians: float, setting: Setting) -> Classifier:
    network, first = copy.deepcopy(dense), setting.epochs // 2
    groups, _ = producer_groups(network, channel_groups(network, torch.zeros(2, *SHAPE)))
    norm = medians * float(torch.cat([one.norms() for one in groups]).median())
    steps = first * -(-IMAGES // BATCH)
    lasso = GroupLassoCallback(norm / (setting.lr * steps), granularity="group", proximal=True)
    # lr is constant here, so that its sum is known
    sparse = Classifier(network, optimizer="sgd", lr=setting.lr, lr_schedule="constant", input_shape=SHAPE)
    train(sparse, setting, first, [lasso])
    module = classifier(shrink(network, torch.zeros(2, *SHAPE)), setting)
    train(module, setting, setting.epochs - first, [])
    return module


def said(name: str, amount: float) -> str:
    return f"{amount:g} medians" if name == LASSO else f"{amount:.0%}" if amount else ""


def draw(points: Points, path: Path) -> None:
    figure = new_figure(6, 3.8)
    axes = figure.subplots()
    tidy(axes)
    for name, of_name in points.items():
        latencies, errors = zip(*sorted(of_name), strict=True)
        axes.plot(latencies, errors, marker="o", markersize=4, linestyle="--" if GLOBAL in name else "-", label=name)
    axes.set_xlabel("latency, relative to the dense network's")
    axes.set_ylabel("error on the MNIST test images (%)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amounts", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--strengths", type=float, nargs="+", default=[2, 3], help="of group lasso, in medians")
    parser.add_argument("--criteria", nargs="+", default=VARIANTS)
    parser.add_argument("--epochs", type=int, default=4, help="of the dense network, and of every variant")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--points", type=Path, help="JSON of the points; those of variants of other runs in it stay")
    parser.add_argument("--figure", type=Path, help="write a PNG of the points")
    arguments = parser.parse_args()
    silence()
    console = Console(width=120)
    setting = Setting(arguments.epochs, arguments.lr, arguments.seed, arguments.root)

    seed_everything(setting.seed, verbose=False)
    first = classifier(ResNet20(width=arguments.width, in_channels=1), setting)
    train(first, setting, setting.epochs, [])
    dense = copy.deepcopy(first.network)
    again = classifier(copy.deepcopy(dense), setting)
    train(again, setting, setting.epochs, [])

    modules = {("dense", 0.0): first, ("dense, trained on", 0.0): again}
    errors = {key: error(module, setting) for key, module in modules.items()}
    console.print(*(f"{name}: {of_name:.2f} %" for (name, _), of_name in errors.items()))
    x = torch.zeros(LATENCY_BATCH, *SHAPE)
    whole = count_macs(first.network, x)[0]
    for criterion in arguments.criteria:
        for amount in arguments.strengths if criterion == LASSO else arguments.amounts:
            key = criterion, amount
            if criterion == LASSO:
                modules[key] = by_group_lasso(dense, amount, setting)
            else:
                modules[key] = by_criterion(dense, criterion, amount, setting)
            errors[key] = error(modules[key], setting)
            share = count_macs(modules[key].network, x)[0] / whole
            console.print(criterion, said(criterion, amount), f"{errors[key]:.2f} %, {share:.1%} of the MACs")

    seconds = compare_latency({f"{name} {amount}": (m.network, x) for (name, amount), m in modules.items()})
    table = Table(title=f"ResNet-20 of width {arguments.width}, {IMAGES:,} MNIST images, {setting.epochs} epochs")
    for column in ("network", "amount", "error %", f"ms, batch {LATENCY_BATCH}", "gain", "MACs left", "parameters"):
        table.add_column(column, justify="left" if column == "network" else "right")
    points: Points = {}
    for (name, amount), module in modules.items():
        own = seconds[f"{name} {amount}"]
        points.setdefault(name, []).append((own / seconds["dense 0.0"], errors[name, amount]))
        table.add_row(
            *(name, said(name, amount), f"{errors[name, amount]:.2f}", f"{own * 1e3:.2f}"),
            f"{seconds['dense 0.0'] / own:.2f}",
            f"{count_macs(module.network, x)[0] / whole:.1%}",
            f"{sum(p.numel() for p in module.network.parameters()):,}",
        )
    console.print(table)
    if arguments.points is not None:
        points = (json.loads(arguments.points.read_text()) if arguments.points.exists() else {}) | points
        arguments.points.write_text(json.dumps(points, indent=1))
    if arguments.figure is not None:
        draw(points, arguments.figure)
    console.print(f"load after: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
