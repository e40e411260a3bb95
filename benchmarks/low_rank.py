"""Low rank: errors against the best possible, with and without data, against fixed ranks, and what the clock says.

Errors: each split of one layer against Eckart and Young by numpy, relative to what the layer's outputs vary. Accuracy:
the same rank, as a share of the highest, for every layer; factors that know the data beside plain SVD; nothing trains
afterwards. Budget: ours beside plain SVD and plain Tucker with one share of the ranks for all layers, which is what
fasterai and the notebooks of tensorly do, at equal parameters, before and after one epoch. Latency: a ResNet-18 with
random weights at 224 x 224 pixels, replaced by cost="latency" until half of the multiply-accumulates are left.
Penalty: LeNet-300-100 trained under the nuclear norm, then a budget, and nothing trains afterwards.

    python benchmarks/low_rank.py --part errors
    python benchmarks/low_rank.py --part accuracy --mnist data/mnist --cifar data/cifar10 --weights weights
    python benchmarks/low_rank.py --part budget --cifar data/cifar10 --weights weights
    python benchmarks/low_rank.py --part latency --batch-sizes 1 8
    python benchmarks/low_rank.py --part penalty --mnist data/mnist --strengths 0 0.003 0.01 0.03
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _support import (
    EPOCHS,
    Found,
    Setting,
    answers,
    classifier,
    clock_of,
    data_of,
    fit,
    initial,
    parts,
    right,
    times,
    trained,
)
from mnist_pruning import silence
from rich.console import Console
from torch import Tensor, nn

from lightning_compress import NuclearNormCallback, lower_rank
from lightning_compress.baselines import Classifier, Digits, LeNet300, ResNet20, TensorLoader
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.low_rank.choose import Chooser
from lightning_compress.low_rank.forms import FORMS
from lightning_compress.low_rank.ranks import DENSE
from lightning_compress.low_rank.replace import KIND, find_sites, replacements_of, total_cost
from lightning_compress.low_rank.sites import Site
from lightning_compress.low_rank.wanted import Wanted
from lightning_compress.measure.macs import count_macs
from lightning_compress.replacement.plan import Plan, Replacement, carry_out
from lightning_compress.replacement.statistics import gather_statistics
from lightning_compress.report.figure import BLUE, GREY, ORANGE, new_figure, tidy

ERRORS, BUDGET, LATENCY = "Largest relative difference to the best possible error", "At equal parameters", "ResNet-18"
PENALTY = "Nuclear norm, LeNet-300-100, MNIST: accuracy by strength, in per cent"
PARTS = ["errors", "accuracy", "budget", "latency", "penalty"]
SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
BATCHES = 16


# ---------------------------------------------------------------------- networks


class Transformer(nn.Module):
    """A small transformer for digits of 8 x 8: 16 patches of 2 x 2, two layers of width 64 with MLPs of 256."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(torch.randn(16, width) * 0.02)
        make = partial(nn.TransformerEncoderLayer, width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.Sequential(make(), make())
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).mT + self.places).mean(1))


class Block(nn.Module):
    """A residual block of two 3 x 3 convolutions."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out))
        plain = n_in == n_out and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.shortcut(x)).relu()


def resnet18() -> nn.Module:
    """The network of He et al. 2015 for images of 224 x 224: 1.8 billion multiply-accumulates."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [Block(*one) for one in [*widths, (512, 512, 1)]]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()


# ---------------------------------------------------------------------- errors


def errors(found: Found) -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.avg_pool2d(torch.randn(64, 12, 10, 10), 3, 1, 1).double()
    rows = torch.randn(500, 60).double() @ torch.randn(60, 60).double()
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        "linear": (nn.Linear(60, 40).double(), rows),
        "channel": (nn.Conv2d(12, 24, 3).double(), x),
        "spatial": (nn.Conv2d(12, 24, 3).double(), x),
    }
    for form, (layer, inputs) in layers.items():
        network = nn.Sequential(layer)
        of = gather_statistics(network, ["0"], [inputs], limit=None)["0"]
        for name, batches in (("plain", None), ("data", [inputs])):
            if form == "spatial" and batches is not None:
                continue  # its best error is not known in closed form
            site = find_sites(network, inputs[:1], Wanted(rank=1), batches=batches)[0]["0"]
            weight = layer.weight.detach()
            matrix = (weight.permute(0, 3, 1, 2) if form == "spatial" else weight).reshape(
                len(weight) * (3 if form == "spatial" else 1), -1
            )
            spread = np.eye(matrix.shape[1]) if batches is None else of.covariance.numpy()
            values, vectors = np.linalg.eigh(spread)
            best = np.linalg.svd(matrix.numpy() @ (vectors * np.sqrt(values.clip(0))), compute_uv=False) ** 2
            worst = 0.0
            for rank in range(1, len(best)):
                parts_of = site.splits.values(form, (rank,))
                product = FORMS[form].product(*(one for key, one in parts_of.items() if key.endswith("weight")))
                change = (weight - product).reshape(len(weight), -1).numpy()
                error = np.trace(change @ (spread if form != "spatial" else np.eye(change.shape[1])) @ change.T)
                worst = max(worst, abs(error - best[rank:].sum()) / best.sum())
            found.add(ERRORS, form, **{f"{name}, units of 1e-15": worst / 1e-15})


# ---------------------------------------------------------------------- accuracy


def first_batches(data: ImageData) -> list[Tensor]:
    return [batch[0] for batch, _ in zip(data.train_dataloader(), range(BATCHES), strict=False)]


def ranks_at(network: nn.Module, example: Tensor, share: float, method: Any, exclude: Sequence[str]) -> dict[str, int]:
    """The same share of the highest rank for each layer."""
    sites, _, _ = find_sites(network, example, Wanted(rank=1, method=method), exclude=exclude)
    most = {name: FORMS[site.forms()[0]].most(site.sizes)[0] for name, site in sites.items()}
    return {name: max(1, round(share * one)) for name, one in most.items()}


def at_ranks(network: nn.Module, example: Tensor, ranks: Mapping[str, int], method: Any, batches: Any) -> nn.Module:
    """The network with these ranks, also where that is no cheaper than before."""
    thin = copy.deepcopy(network)
    patterns = [f"{name}.weight" for name in ranks]
    sites, _, _ = find_sites(thin, example, Wanted(rank=1, method=method), batches=batches, target=patterns)
    made = {}
    for name, site in sites.items():
        form = site.forms()[0]
        numbers = site.of_rank(form, ranks[name])
        assert numbers is not None
        made |= {path: Replacement(*one) for path, one in site.values(form, numbers).items()}
    carry_out(thin, Plan(made), KIND)
    return thin


def accuracy_by_rank(
    found: Found, title: str, module: Classifier, data: ImageData, test: Any, method: Any, exclude: Sequence[str] = ()
) -> None:
    network, batches = module.network.eval(), first_batches(data)
    example = test.inputs[:1]
    dense = right(answers(network, test.inputs), test.targets)
    ways = {"plain SVD": None, "knows the data": batches}
    found.add(title, DENSE, **dict.fromkeys(ways, dense))
    for share in SHARES:
        ranks = ranks_at(network, example, share, method, exclude)
        row = {
            name: right(answers(at_ranks(network, example, ranks, method, some), test.inputs), test.targets)
            for name, some in ways.items()
        }
        found.add(title, f"{share:.3f}", **row)


def digits_setting(arguments: argparse.Namespace, seed: int) -> tuple[Setting, ImageData]:
    setting = Setting("digits", "", 5 if arguments.quick else 60, 64, 0.002, seed, "32-true", weights=arguments.weights)
    return setting, Digits(batch_size=64, seed=seed)


def accuracy(found: Found, arguments: argparse.Namespace, seed: int) -> None:
    lenet, images = setting_of(arguments, "mnist", seed)
    module = trained("lenet300", lambda: dense_lenet(lenet), images, lenet)
    assert isinstance(module, Classifier)
    accuracy_by_rank(found, "LeNet-300-100, MNIST", module, images, test_of(images, lenet, None), "auto", ["fc3"])
    small, digits = digits_setting(arguments, seed)
    shape = (1, 8, 8)
    make = partial(classifier, optimizer="adamw", weight_decay=0.01)
    transformer = trained("transformer", lambda: make(initial(Transformer, small), small, shape), digits, small)
    assert isinstance(transformer, Classifier)
    others = ["patches", "head"]
    accuracy_by_rank(
        found, "MLPs of a transformer, digits", transformer, digits, test_of(digits, small, None), "auto", others
    )
    resnet, pictures = setting_of(arguments, "cifar10", seed)
    network = trained("plain", lambda: dense_resnet(resnet), pictures, resnet)
    assert isinstance(network, Classifier)
    test = test_of(pictures, resnet, arguments.tested)
    accuracy_by_rank(found, "ResNet-20, CIFAR-10", network, pictures, test, "channel", ["conv", "fc", "*shortcut*"])


def setting_of(arguments: argparse.Namespace, dataset: str, seed: int) -> tuple[Setting, ImageData]:
    folder = arguments.mnist if dataset == "mnist" else arguments.cifar
    epochs = 1 if arguments.quick else EPOCHS[dataset]
    weights = None if arguments.quick else arguments.weights
    setting = Setting(dataset, folder, epochs, 128, 0.1, seed, "32-true", weights=weights, quick=arguments.quick)
    return setting, data_of(setting)


def test_of(data: ImageData, setting: Setting, most: int | None) -> Any:
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    test = parts(data, setting)[1]
    return TensorLoader(test.inputs[:most], test.targets[:most], batch_size=500)


def dense_lenet(setting: Setting) -> Classifier:
    return classifier(initial(LeNet300, setting), setting, (1, 28, 28))


def dense_resnet(setting: Setting) -> Classifier:
    return classifier(initial(partial(ResNet20, width=16), setting), setting, (3, 32, 32))


# ---------------------------------------------------------------------- budget


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def fixed_share(network: nn.Module, example: Tensor, wanted: int) -> nn.Module:
    """Plain SVD and, of 3 x 3 convolutions, plain Tucker, with one share of the ranks that gives so many parameters."""
    sites, _, _ = find_sites(network, example, Wanted(rank=1))

    def numbers_at(share: float) -> dict[str, tuple[str, tuple[int, ...]]]:
        chosen = {}
        for name, site in sites.items():
            form = "tucker" if "tucker" in site.forms() else site.forms()[0]
            numbers = tuple(max(1, round(share * one)) for one in FORMS[form].most(site.sizes))
            if site.costs(form, numbers).parameters < site.dense.parameters:
                chosen[name] = (form, numbers)
        return chosen

    def size(chosen: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
        saved = sum(sites[name].dense.parameters - sites[name].costs(*one).parameters for name, one in chosen.items())
        return parameters(network) - saved

    share = max(one for one in np.linspace(0.02, 1, 99) if size(numbers_at(one)) <= wanted)
    thin = copy.deepcopy(network)
    made = {
        path: Replacement(*one)
        for name, (form, numbers) in numbers_at(share).items()
        for path, one in sites[name].values(form, numbers).items()
    }
    carry_out(thin, Plan(made), KIND)
    return thin


def budget(found: Found, arguments: argparse.Namespace, seed: int) -> None:
    setting, data = setting_of(arguments, "cifar10", seed)
    module = trained("plain", lambda: dense_resnet(setting), data, setting)
    test = test_of(data, setting, arguments.tested)
    batches, example = first_batches(data), test.inputs[:1]
    network = module.network.eval()
    trained_on = data if arguments.images is None else data_of(replace(setting, images=arguments.images))
    for share in arguments.shares:
        ways: dict[str, Callable[[], nn.Module]] = {
            "ours": lambda share=share: lowered(network, example, share, batches),
            "ours, plain SVD": lambda share=share: lowered(network, example, share, None),
            "fixed share, Tucker": lambda share=share: fixed_share(
                network, example, round(share * parameters(network))
            ),
        }
        for name, make in ways.items():
            thin = make()
            before = right(answers(thin.eval(), test.inputs), test.targets)
            again = classifier(thin, replace(setting, lr=0.02), (3, 32, 32))
            fit(again, trained_on, replace(setting, images=arguments.images), epochs=1)
            after = right(answers(thin.eval(), test.inputs), test.targets)
            print(f"{share:.2f}: {name}: {before:.2f}, then {after:.2f} %", flush=True)
            share_left = 100 * parameters(thin) / parameters(network)
            found.add(BUDGET, f"{share:.2f}: {name}", parameters_left=share_left, before=before, after_one_epoch=after)


def lowered(network: nn.Module, example: Tensor, share: float, batches: Any) -> nn.Module:
    thin = copy.deepcopy(network)
    lower_rank(thin, example, budget=share, batches=batches)
    return thin


# ---------------------------------------------------------------------- penalty


def penalty(found: Found, arguments: argparse.Namespace, seed: int) -> None:
    setting, data = setting_of(arguments, "mnist", seed)
    test = test_of(data, setting, None)
    batches, example = first_batches(data), test.inputs[:1]
    for strength in arguments.strengths:
        module, callback = dense_lenet(setting), NuclearNormCallback(strength)
        start = time.perf_counter()
        fit(module, data, setting, callbacks=[callback])
        seconds = time.perf_counter() - start
        network = module.network.eval()
        row = {"rank left": 100 * callback.rank_left(), "dense": right(answers(network, test.inputs), test.targets)}
        for share in arguments.shares:
            thin = lowered(network, example, share, batches).eval()
            row[f"{share:g} left"] = right(answers(thin, test.inputs), test.targets)
        print(f"seed {seed}, strength {strength:g}: {row}, {seconds:.0f} s", flush=True)
        found.add(PENALTY, f"{strength:g}", **row)


# ---------------------------------------------------------------------- latency


def latency(found: Found, arguments: argparse.Namespace) -> None:
    clock = clock_of(arguments)
    for size in arguments.batch_sizes:
        torch.manual_seed(0)
        network, x = resnet18(), torch.randn(size, 3, 224, 224)
        sites, _, _ = find_sites(network, x, Wanted(budget=0.5, cost="latency"))
        chooser = Chooser(sites, "latency", clock)
        total = total_cost(network, x, "latency", clock)
        dense = count_macs(network, x)[0] * size

        def left(budget: float, chooser: Chooser = chooser, total: float = total, dense: int = dense) -> float:
            chosen = chooser.by_budget(budget, total).values()
            return 1 - sum(one.before.macs - one.after.macs for one in chosen) / dense

        low, high = arguments.least, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if left(middle) < 0.5 else (low, middle)
        choices = chooser.by_budget(high, total)
        thin = copy.deepcopy(network)
        carry_out(thin, Plan(replacements_of(sites, choices)), KIND)
        macs = count_macs(thin, x)[0] * size
        seconds = times({"dense": network, "thin": thin}, [x], arguments.rounds, clock)
        faster = seconds["dense"][0] / seconds["thin"][0]
        by_layer = layer_seconds(sites, network, thin, choices, clock, arguments.rounds)
        changed = [one for one in choices.values() if one.option.form != DENSE]
        fewer = sum(one.before.macs for one in changed) / sum(one.after.macs for one in changed)
        layers_faster = sum(one for one, _ in by_layer) / sum(one for _, one in by_layer)
        found.add(
            LATENCY,
            f"batch {size}",
            MACs_left=macs / dense,
            time_left=1 / faster,
            times_faster=faster,
            times_fewer_MACs=dense / macs,
            share_of_the_ideal=faster * macs / dense,
            layers_replaced=len(changed),
            of_them_slower=sum(after > before for before, after in by_layer),
            they_faster=layers_faster,
            they_fewer_MACs=fewer,
            their_share=layers_faster / fewer,
        )
        for name, one in choices.items():
            print(f"batch {size}: {name}: {one.option.form} {one.option.numbers} {one.why}", flush=True)


def layer_seconds(
    sites: Mapping[str, Site], network: nn.Module, thin: nn.Module, choices: Any, clock: Any, rounds: int
) -> list[tuple[float, float]]:
    """The seconds of each replaced layer before and after, timed by itself."""
    found = []
    for name, one in choices.items():
        if one.option.form != DENSE:
            (shape,) = sites[name].seen.layer.inputs
            ways = {"dense": network.get_submodule(name), "thin": thin.get_submodule(name)}
            seconds = times(ways, [torch.randn(shape)], rounds, clock)
            found.append((seconds["dense"][0], seconds["thin"][0]))
    return found


# ---------------------------------------------------------------------- all of it


def figure(found: Found, path: Path) -> None:
    tables = {title: dict(rows) for title, rows in found.tables.items() if DENSE in rows}
    drawing = new_figure(4 * len(tables), 3.5)
    all_axes = drawing.subplots(1, len(tables), squeeze=False)[0]
    for axes, (title, rows) in zip(all_axes, tables.items(), strict=True):
        tidy(axes)
        dense = rows.pop(DENSE)
        shares = [float(share) for share in rows]
        for name, color in zip(dense, (ORANGE, BLUE), strict=True):
            axes.plot(shares, [np.median(row[name]) for row in rows.values()], marker="o", label=name, color=color)
        axes.axhline(float(np.median(dense[name])), color=GREY, linewidth=0.8, label=DENSE)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlabel="rank, as a share of the highest", ylabel="test accuracy (%), no training")
        axes.legend(frameon=False, fontsize=8)
    drawing.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=["errors"])
    parser.add_argument("--mnist", default="data/mnist")
    parser.add_argument("--cifar", default="data/cifar10")
    parser.add_argument("--weights", type=Path, help="a folder to which weights are written, or from which they come")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tested", type=int, help="test images of CIFAR-10; by default all")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.4, 0.25], help="budgets of parameters")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.003, 0.01, 0.03], help="of the penalty")
    parser.add_argument("--images", type=int, help="training images of the one epoch; by default all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--least", type=float, default=0.3, help="of time: the search for half of the MACs begins here")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each network")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine with other work")
    parser.add_argument("--figure", type=Path, help="of accuracy against rank")
    parser.add_argument("--json", type=Path, help="write the numbers of all seeds here as well")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")
    arguments = parser.parse_args()
    silence()
    found, start = Found(), time.perf_counter()
    if "errors" in arguments.part:
        errors(found)
    if "latency" in arguments.part:
        latency(found, arguments)
    for seed in arguments.seeds:
        if "accuracy" in arguments.part:
            accuracy(found, arguments, seed)
        if "budget" in arguments.part:
            budget(found, arguments, seed)
        if "penalty" in arguments.part:
            penalty(found, arguments, seed)
    found.show(Console(width=140), arguments.json)
    if arguments.figure is not None:
        figure(found, arguments.figure)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
