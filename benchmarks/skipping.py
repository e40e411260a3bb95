"""Blocks that each sample chooses, in a trained ResNet-20: accuracy, multiply-accumulates and time, beside controls.

A trained network gets gates and trains on for a few epochs. All controls start from the same weights and train on for
as many epochs with the same optimizer, but for the narrower network, which trains from the beginning for all of them:

    trained on        the network without gates
    random gates      the gated network, whose gates are drawn at random with the same rate for each block
    always the same   the gated network, which runs the most used blocks for all samples, for as many MACs
    static depth      the blocks that cost the least loss per MAC leave for good
    narrower          a ResNet-20 of equal MACs

Accuracies and rates are those of test images. "varying": the share of gates whose rate is strictly between 5 and 95 %.
Times: of the deployed network, in turns with the plain one on one thread, the median over batches; "by share" divides
by the share of MACs, so that 1.0 would be time in proportion.

    python benchmarks/skipping.py --dataset mnist --data data/mnist --weights weights
    python benchmarks/skipping.py --dataset cifar10 --data data/cifar10 --weights weights --seeds 0 1 2 --json s.json
    python benchmarks/skipping.py --drawn-from s.json --figure skipping.png
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _support import (
    Found,
    Setting,
    add_settings,
    answers,
    classifier,
    clock_of,
    data_of,
    fit,
    initial,
    parts,
    right,
    settings,
    times,
    trained,
)
from mnist_pruning import silence
from rich.console import Console
from torch import nn

from lightning_compress import BlockPruningCallback, SkippableBlocks
from lightning_compress.baselines import Classifier, ResNet20, TensorLoader
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.measure.macs import count_macs
from lightning_compress.report.figure import BLUE, GREY, ORANGE, new_figure, tidy
from lightning_compress.skipping.budget import most_used
from lightning_compress.skipping.controls import Drawn, Fixed
from lightning_compress.skipping.gates import gates_of

ACCURACY, CHOICES, TIMES = "Test accuracy by share of the MACs", "What the gates choose", "Times of deployed networks"
TUNE = {"mnist": 2, "cifar10": 5}  # epochs


def resnet(setting: Setting, shape: Sequence[int], width: int) -> Classifier:
    """A ResNet-20 from the seed's initial weights."""
    return classifier(initial(partial(ResNet20, width=width, in_channels=shape[0]), setting), setting, shape)


def gated(plain: nn.Module, setting: Setting, shape: Sequence[int], **options: Any) -> SkippableBlocks:
    """A trained network with gates, which are open."""
    module = classifier(copy.deepcopy(plain), setting, shape)
    return SkippableBlocks(module, network="network", example_inputs=torch.zeros(2, *shape), **options)


def ways(module: SkippableBlocks, test: TensorLoader) -> dict[str, tuple[float, float]]:
    """The accuracy and the share of the MACs of the gated network, and of its controls without training."""
    network: Any = module.network
    gates = gates_of(network)
    assert gates is not None
    used, most = float(gates.used(gates.rates)), most_used(gates)
    decide = {
        "gates": (None, used),
        "random gates": (Drawn(gates), used),
        "always the same": (Fixed(most), float(gates.used(torch.tensor(most, dtype=torch.float64)))),
    }
    found = {}
    for name, (instead, share) in decide.items():
        gates.instead = instead
        found[name] = right(answers(network, test.inputs), test.targets), share
    gates.instead = None
    return found


def thinned(plain: nn.Module, setting: Setting, data: ImageData, blocks: int, of: int) -> Classifier:
    """The network that some blocks have left for good, and that trained on."""
    found = classifier(copy.deepcopy(plain), setting, data.input_shape)
    fit(found, data, setting, callbacks=[BlockPruningCallback(blocks / of, end_epoch=setting.epochs / 2)])
    return found.eval()


def share_of(network: nn.Module, plain: nn.Module, test: TensorLoader) -> float:
    return count_macs(network, test.inputs[:1])[0] / count_macs(plain, test.inputs[:1])[0]


def timing(
    plain: nn.Module,
    deployed: dict[str, nn.Module],
    shares: dict[str, float],
    test: TensorLoader,
    setting: Setting,
    clock: Callable[[], float],
    found: Found,
) -> None:
    """Times as shares of the plain network's, and these by the share of the MACs."""
    order = torch.randperm(len(test.inputs), generator=torch.Generator().manual_seed(0))
    for size, count, rounds in ((64, 2, 1), (1, 10, 1)) if setting.quick else ((64, 30, 3), (1, 300, 3)):
        batches = test.inputs[order[: size * count]].split(size)
        seconds = {
            name: statistics.median(of_batches)
            for name, of_batches in times({"plain": plain, **deployed}, batches, rounds, clock).items()
        }
        found.add(TIMES, "plain", **{f"ms at {size}": 1000 * seconds["plain"]})
        for name in deployed:
            by_plain = seconds[name] / seconds["plain"]
            found.add(TIMES, name, MACs=shares[name], **{f"time at {size}": by_plain})
            found.add(TIMES, name, **{f"by share at {size}": by_plain / shares[name]})


def one_seed(setting: Setting, arguments: argparse.Namespace, clock: Callable[[], float], found: Found) -> None:
    data = data_of(setting)
    data.setup()
    shape, width = data.input_shape, arguments.width
    val, test = parts(data, setting)
    named = "plain" if width == 16 else f"width{width}"
    start: Any = trained(named, partial(resnet, setting, shape, width), data, setting)
    plain: nn.Module = start.network
    tuning = replace(setting, lr=arguments.tune_lr)
    epochs = arguments.tune

    def tuned(name: str, make: Callable[[], Any]) -> Any:
        kind = f"{named}-{name}-{epochs}e"
        return trained(kind, make, data, tuning, epochs=epochs)

    def add(name: str, network: nn.Module, share: float | None = None) -> None:
        accuracy = right(answers(network, test.inputs), test.targets)
        share = share_of(network, plain, test) if share is None else share
        found.add(ACCURACY, name, accuracy=accuracy, MACs=share)
        print(f"{setting.dataset}, seed {setting.seed}, {name}: {accuracy:.2f} %, {share:.1%}", flush=True)

    add("trained", plain)
    longer = tuned("longer", lambda: classifier(copy.deepcopy(plain), tuning, shape)).network
    add("trained on", longer)
    deployed: dict[str, nn.Module] = {}
    shares: dict[str, float] = {}
    for gate, budget, target in product(arguments.gates, arguments.budgets, arguments.targets):
        options = {"gate": gate, "budget": budget, "target": target, "train": arguments.train}
        name = f"{gate}, {budget}, {target:g}"
        if arguments.train != "straight_through":
            name += f", {arguments.train}"
        module = tuned(f"skip-{name.replace(', ', '-')}", partial(gated, plain, tuning, shape, **options))
        if arguments.only == "train":
            continue
        measured = module.measure(TensorLoader(test.inputs, test.targets, batch_size=500))
        for way, (accuracy, share) in ways(module, test).items():
            found.add(ACCURACY, f"{name}: {way}", accuracy=accuracy, MACs=share)
            print(f"{setting.dataset}, seed {setting.seed}, {name}, {way}: {accuracy:.2f} %", flush=True)
        found.add(
            CHOICES,
            name,
            MACs=measured.used,
            varying=measured.varying,
            policies=measured.policies,
            bits=measured.entropy,
            **{block.removeprefix("stages."): rate for block, rate in measured.rates.items()},
        )
        module.measure(TensorLoader(val.inputs, val.targets, batch_size=500))  # deploy() looks at the rates
        deployed[name], shares[name] = module.deploy(), measured.used
    if arguments.only == "train":
        return
    if arguments.controls:
        number = len(measured.rates)
        for blocks in arguments.blocks:
            thin: Any = thinned(plain, replace(tuning, epochs=epochs), data, blocks, number)
            add(f"static depth, {blocks} of {number} blocks", thin.network)
            name = f"static depth, {blocks}"
            deployed[name], shares[name] = thin.network, share_of(thin.network, plain, test)
        whole = replace(setting, epochs=setting.epochs + epochs)
        for narrow in arguments.narrow:
            one: Any = trained(f"width{narrow}", partial(resnet, whole, shape, narrow), data, whole)
            add(f"width {narrow}, alone", one.network)
            deployed[f"width {narrow}"], shares[f"width {narrow}"] = one.network, share_of(one.network, plain, test)
    if arguments.only != "accuracy" and setting.seed == arguments.seeds[0]:
        opened = gated(plain, tuning, shape)
        opened.eval().measure(TensorLoader(val.inputs[:500], val.targets[:500], batch_size=500))
        deployed["open gates, static"], shares["open gates, static"] = opened.deploy(), 1.0
        timing(plain, deployed, shares, test, setting, clock, found)


def draw(rows: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw accuracy against the share of the MACs: medians over seeds, with bars from the lowest to the highest."""
    kinds: dict[str, list[Mapping[str, Sequence[float]]]] = {}
    for name, row in rows.items():
        gate, _, way = name.partition(": ")
        kind = f"{gate.split(',')[0]}, {way}" if way else name.split(",")[0].split(" 1")[0]
        kinds.setdefault("width, alone" if name.startswith("width") else kind, []).append(row)
    gated_kinds = list(dict.fromkeys(kind.split(",")[0] for kind in kinds if kind.endswith(", gates")))
    colors = dict(zip(gated_kinds, (BLUE, ORANGE), strict=False))
    lines = {
        "trained": ("", "D"),
        "trained on": ("", "^"),
        "gates": ("-", "o"),
        "random gates": (":", "."),
        "always the same": ("--", "x"),
    }
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for kind, points in kinds.items():
        gate, _, way = kind.partition(", ")
        line, marker = lines.get(way or gate, ("-", "s"))
        points = sorted(points, key=lambda one: statistics.median(one["MACs"]))
        accuracies = [one["accuracy"] for one in points]
        middle = [statistics.median(one) for one in accuracies]
        bars = [[m - min(a) for m, a in zip(middle, accuracies, strict=True)]]
        bars.append([max(a) - m for m, a in zip(middle, accuracies, strict=True)])
        axes.errorbar(
            [statistics.median(one["MACs"]) for one in points],
            middle,
            yerr=bars,
            color=colors.get(gate, GREY if kind != "width, alone" else "black"),
            linestyle=line,
            marker=marker,
            linewidth=1.2,
            elinewidth=0.6,
            label="a narrower network, alone" if kind == "width, alone" else kind,
        )
    tidy(axes)
    axes.set_xlabel("share of the network's MACs")
    axes.set_ylabel("test accuracy (%)")
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--gates", nargs="+", default=["per_block", "policy"])
    parser.add_argument("--budgets", nargs="+", default=["total"])
    parser.add_argument("--blocks", type=int, nargs="*", default=[3, 4], help="that leave for good in static depth")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--train", default="straight_through")
    parser.add_argument("--tune", type=int, help="epochs with gates; by default 2 on MNIST and 5 on CIFAR-10")
    parser.add_argument("--tune-lr", type=float, default=0.05)
    parser.add_argument("--narrow", type=int, nargs="*", default=[11, 13], help="widths of networks trained alone")
    parser.add_argument("--no-controls", dest="controls", action="store_false")
    parser.add_argument("--figure", type=Path, help="write a PNG of accuracy against MACs")
    parser.add_argument("--drawn-from", type=Path, help="only draw the --json of an earlier run")
    arguments = parser.parse_args()
    if arguments.drawn_from is not None:
        draw(json.loads(arguments.drawn_from.read_text())[ACCURACY], arguments.figure)
        return
    arguments.tune = 1 if arguments.quick else arguments.tune or TUNE[arguments.dataset]
    silence()
    torch.set_num_threads(1)
    found, console = Found(), Console(width=200)
    for setting in settings(arguments):
        one_seed(setting, arguments, clock_of(arguments), found)
    found.show(console, arguments.json)
    if arguments.figure is not None:
        draw(found.tables[ACCURACY], arguments.figure)


if __name__ == "__main__":
    main()
