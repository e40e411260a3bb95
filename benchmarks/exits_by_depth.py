"""Why exits need care: how good naive features are by depth, and what one early classifier does to the last one.

"features": a network is trained alone and frozen; global averages of what its blocks return are given to a linear
classifier and to k nearest neighbours. "damage": it is trained again, from the same initial weights and on the same
batches, with one early classifier (global averages and a linear layer) after one block, the two losses summed; the
accuracy of the last classifier is divided by that of the network trained alone.

The networks are a ResNet-20 and a small MSDNet. After figure 3 of Huang et al. (1703.09844), which shows networks that
train for 300 epochs on all of CIFAR-100; this has a few epochs on a part of CIFAR-10 and one seed.

    python benchmarks/exits_by_depth.py --root data/cifar10 --figure exits_by_depth.png
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from _support import Setting, UpTo, accuracies, add_part, classifier, data_of, fit, initial, part_of
from mnist_pruning import silence
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress import EarlyExitHeads
from lightning_compress.baselines import CIFAR10, MSDNet, ResNet20
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.measure.macs import count_macs
from lightning_compress.report.figure import BLUE, GREY, ORANGE, new_figure, tidy

NEIGHBOURS, SHAPE = 10, CIFAR10.input_shape
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: ResNet20(width=8),
    "MSDNet": lambda: MSDNet(blocks=5, base=2, step=1, channels=8, growth=4, head_width=64),
}


def layers_of(network: nn.Module) -> list[str]:
    """Blocks by depth, the last one included."""
    if isinstance(network, MSDNet):
        last = len(network.blocks) - 1
        return [*network.exits, f"blocks.{last}.{len(network.blocks[last]) - 1}.scale2"]  # type: ignore[arg-type]
    return [f"stages.{stage}.{block}" for stage in range(3) for block in range(3)]


def depths(network: nn.Module) -> list[float]:
    """Share of the network's MACs up to the end of each block."""
    x = torch.zeros(1, *SHAPE)
    frozen = copy.deepcopy(network).eval()
    whole = count_macs(frozen, x)[0]
    return [count_macs(UpTo(frozen, [layer]), x)[0] / whole for layer in layers_of(network)]


def averages(network: nn.Module, images: Tensor) -> list[Tensor]:
    """For each block the averages of all images, (N, C)."""
    up_to = UpTo(network.eval(), layers_of(network))
    with torch.no_grad():
        batches = [[one.mean((2, 3)) for one in up_to(batch)] for batch in images.split(500)]
    return [torch.cat(of_block) for of_block in zip(*batches, strict=True)]


def linear_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Multinomial logistic regression, until it has converged or for 100 steps of L-BFGS."""
    layer = nn.Linear(train.shape[1], 10)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(train), labels) + 1e-4 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float((layer(test).argmax(1) == test_labels).float().mean())


def neighbour_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    nearest = torch.cat([torch.cdist(part, train).topk(NEIGHBOURS, largest=False).indices for part in test.split(500)])
    return float((labels[nearest].mode(1).values == test_labels).float().mean())


def features(network: nn.Module, data: ImageData) -> list[tuple[float, float]]:
    """Accuracy of a linear classifier and of nearest neighbours on each block's averages."""
    train, test = data.train_dataloader(), data.test_dataloader()
    found = []
    for one, other in zip(averages(network, train.inputs), averages(network, test.inputs), strict=True):
        mean, scale = one.mean(0), one.std(0).clamp(min=1e-6)
        known = (one - mean) / scale, train.targets, (other - mean) / scale, test.targets
        found.append((linear_accuracy(*known), neighbour_accuracy(*known)))
    return found


def global_pool_head(feature: Tensor, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(feature.shape[1], num_classes))


def damage(make: Callable[[], nn.Module], layer: str, data: ImageData, setting: Setting) -> tuple[float, float]:
    """Accuracy of the last classifier and of the early one, trained together."""
    module = classifier(initial(make, setting), setting, SHAPE)
    wrapped = EarlyExitHeads(module, [layer], num_classes=10, head=global_pool_head, weights="equal", network="network")
    fit(wrapped, data, setting)
    found = accuracies(wrapped, data, setting)
    return found["test_acc"], found["exit1/test_acc"]


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for (name, rows), color in zip(found.items(), (BLUE, ORANGE), strict=True):
        left.plot(rows["depth"], rows["linear"], color=color, marker="o", label=f"{name}, linear")
        left.plot(rows["depth"], rows["neighbours"], color=color, marker=".", linestyle=":", label=f"{name}, k-NN")
        left.axhline(rows["alone"][0], color=color, linewidth=0.8, linestyle="--")
        right.plot(rows["exit depth"], rows["last"], color=color, marker="o", label=name)
    right.axhline(1.0, color=GREY, linewidth=0.8)
    left.set_title("Naive features by depth", loc="left", fontweight="bold")
    left.set_ylabel("test accuracy (dashed: the network)")
    right.set_title("One early classifier, trained jointly", loc="left", fontweight="bold")
    right.set_ylabel("last classifier: joint / alone")
    for axes in (left, right):
        tidy(axes)
        axes.set_xlabel("share of the network's MACs")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_part(parser, images=8000, epochs=6)
    parser.add_argument("--every", type=int, default=2, help="the second figure has an exit after every so many blocks")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--figure", type=Path, help="write a PNG of both figures")
    arguments = parser.parse_args()
    silence()
    console, setting = Console(width=120), part_of(arguments)
    data = data_of(setting, val_size=0)
    data.setup()

    found: dict[str, dict[str, list[float]]] = {}
    for name, make in NETWORKS.items():
        layers, share = layers_of(make()), depths(make())
        module = classifier(initial(make, setting), setting, SHAPE)
        fit(module, data, setting)
        alone = accuracies(module, data, setting)["test_acc"]
        rows = features(module.network, data)
        console.print(f"{name} alone: {alone:.2%}")
        chosen = range(0, len(layers) - 1, arguments.every)
        joint: dict[int, tuple[float, float]] = {}
        for k in chosen:
            joint[k] = damage(make, layers[k], data, setting)
            console.print(f"{name}, exit after {layers[k]}: last {joint[k][0]:.2%}, early {joint[k][1]:.2%}")
        table = Table(title=f"{name} alone: {alone:.2%}")
        for column in (
            "block",
            "MACs",
            "linear",
            "k-NN",
            "its classifier, joint",
            "last, joint",
            "last: joint / alone",
        ):
            table.add_column(column, justify="left" if column == "block" else "right")
        for k, (layer, depth, (linear, neighbours)) in enumerate(zip(layers, share, rows, strict=True)):
            last, early = joint.get(k, (None, None))
            of_joint = ["", "", ""] if last is None else [f"{early:.1%}", f"{last:.1%}", f"{last / alone:.3f}"]
            table.add_row(layer, f"{depth:.0%}", f"{linear:.1%}", f"{neighbours:.1%}", *of_joint)
        console.print(table)
        found[name] = {
            "depth": share,
            "linear": [one for one, _ in rows],
            "neighbours": [one for _, one in rows],
            "alone": [alone],
            "exit depth": [share[k] for k in chosen],
            "last": [joint[k][0] / alone for k in chosen],
        }
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.figure is not None:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
