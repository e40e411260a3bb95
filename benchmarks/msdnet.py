"""MSDNet's two evaluations: accuracy at any time, and on a budget per batch, beside plain networks of the same cost.

A small MSDNet is trained with all its classifiers at once, on the plain sum of their losses, and evaluated as its paper
does (Huang et al., 1703.09844). Anytime: the accuracy of classifier k on all test images, at the MACs up to it, those
of the heads before it included. Budgeted batch: thresholds on the largest softmax probability, chosen on validation
images; the paper's, with which the share of samples that leave at classifier k is proportional to q^k, one q after the
other; and those of `calibrate` for the same mean cost. Accuracy and mean MACs are those of the test images under these
thresholds. The controls are the same network without exits and ResNet-20 of several widths, trained as long.

What is less than in the paper: its budgeted network has 5 blocks (15 layers), 16 channels at first, growth 6 and heads
of 128, and trains for 300 epochs on 45,000 images with Nesterov momentum and a learning rate that falls at two epochs;
this one has 4 blocks (10 layers), 8 channels, growth 4, heads of 64, and its training is a cosine of a few epochs.

    python benchmarks/msdnet.py --root data/cifar10 --figure msdnet.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _support import Setting, UpTo, accuracies, add_part, classifier, data_of, fit, initial, part_of
from mnist_pruning import silence
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor, nn

from lightning_compress import EarlyExitHeads
from lightning_compress.baselines import CIFAR10, MSDNet, ResNet20, msdnet_classifier
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.early_exit.calibration import Table, calibrate, evaluate, q_sweep
from lightning_compress.early_exit.heads import heads_of
from lightning_compress.early_exit.rules import ExitRule, exit_costs
from lightning_compress.measure.macs import count_macs
from lightning_compress.report.figure import BLUE, GREY, ORANGE, new_figure, tidy

HEAD_WIDTH, VALIDATION, BUDGETS, SHAPE = 64, 2000, 8, CIFAR10.input_shape
Point = tuple[float, float]  # MACs per sample, accuracy


def small_msdnet() -> MSDNet:
    return MSDNet(blocks=4, base=1, step=1, step_mode="lin_grow", channels=8, growth=4, head_width=HEAD_WIDTH)


def tables(network: MSDNet, data: ImageData) -> tuple[Table, Table]:
    """Logits of every classifier on the validation and the test images, and what classifiers cost."""
    found = heads_of(network.eval())
    assert found is not None
    heads = found.by_layer()
    x = torch.zeros(1, *SHAPE)
    ends = [count_macs(UpTo(network, [layer]), x)[0] for layer in heads] + [count_macs(network, x)[0]]
    stages = tuple(float(end - start) for start, end in zip([0, *ends], ends, strict=False))
    up_to = UpTo(network, [*heads, "classifier"])
    of_heads = tuple(float(count_macs(head, one)[0]) for head, one in zip(heads.values(), up_to(x)[:-1], strict=True))

    def answers(images: Tensor) -> list[Tensor]:
        batches = []
        for batch in images.split(500):
            *features, logits = up_to(batch)
            batches.append([*(head(one) for head, one in zip(heads.values(), features, strict=True)), logits])
        return [torch.cat(of_exit) for of_exit in zip(*batches, strict=True)]

    with torch.no_grad():
        parts = data.val_dataloader(), data.test_dataloader()
        val, test = (
            Table(logits=answers(one.inputs), targets=one.targets, stages=stages, heads=of_heads) for one in parts
        )
    return val, test


def anytime(table: Table) -> list[Point]:
    """MACs up to each classifier, and its accuracy."""
    right = [(logits.argmax(1) == table.targets).float().mean().item() for logits in table.logits]
    costs = exit_costs(table.stages, table.heads, range(len(table.heads)))
    return list(zip(costs, right, strict=True))


def budgeted(val: Table, test: Table) -> dict[str, list[Point]]:
    """Mean MACs and accuracy of the test images: under the thresholds of some q, and under ours for the same cost.

    "budget" has those of the validation images under the thresholds of q.
    """
    swept = q_sweep(val)
    low, high = min(swept).mean_cost, max(swept).mean_cost
    wanted = [low + (high - low) * i / (BUDGETS - 1) for i in range(BUDGETS)]
    chosen = {min(swept, key=lambda one: abs(one.mean_cost - budget)) for budget in wanted}
    found: dict[str, list[Point]] = {"budget": [], "q-sweep": [], "calibrate": []}
    for one in sorted(chosen):
        found["budget"].append((one.mean_cost, one.accuracy))
        paper = ExitRule(rule="confidence", thresholds=one.thresholds, temperatures=(1.0,) * len(test.stages))
        for name, rule in (("q-sweep", paper), ("calibrate", calibrate(val, budget=one.mean_cost))):
            outcome = evaluate(test, rule)
            found[name].append((outcome.mean_cost, outcome.accuracy))
    return found


def alone(make: Callable[[], nn.Module], data: ImageData, setting: Setting) -> Point:
    """MACs and accuracy of a network that is trained without exits."""
    network = initial(make, setting)
    module = classifier(network, setting, SHAPE)
    fit(module, data, setting)
    return float(count_macs(network.eval(), torch.zeros(1, *SHAPE))[0]), accuracies(module, data, setting)["test_acc"]


def draw(found: dict[str, list[Point]], path: Path) -> None:
    figure = new_figure(9, 3.8)
    for axes, title, names in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        ("Anytime", "Budget per batch"),
        (("anytime",), ("q-sweep", "calibrate")),
        strict=True,
    ):
        tidy(axes)
        axes.set_title(f"MSDNet: {title.lower()}", loc="left", fontweight="bold")
        for name, color in zip((*names, "plain ResNet-20"), (BLUE, ORANGE, GREY)[-len(names) - 1 :], strict=True):
            macs, accuracy = zip(*sorted(found[name]), strict=True)
            axes.plot([one / 1e6 for one in macs], accuracy, color=color, marker="o", markersize=4, label=name)
        for macs, accuracy in found["without exits"]:
            axes.plot([macs / 1e6], [accuracy], color="black", marker="D", linestyle="", label="MSDNet without exits")
        axes.set_xlabel("million MACs per image")
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("test accuracy")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_part(parser, images=8000, epochs=8)
    parser.add_argument("--widths", type=int, nargs="*", default=[4, 6, 9], help="of the plain ResNet-20s")
    parser.add_argument("--json", type=Path, help="write the points here as well")
    parser.add_argument("--figure", type=Path, help="write a PNG of both evaluations")
    arguments = parser.parse_args()
    silence()
    console, setting = Console(width=120), part_of(arguments)
    data = data_of(setting, val_size=VALIDATION)
    data.setup()

    network = initial(small_msdnet, setting)
    module = EarlyExitHeads(
        classifier(network, setting, SHAPE),
        list(network.exits),
        num_classes=10,
        head=partial(msdnet_classifier, width=HEAD_WIDTH),
        weights="equal",
        network="network",
    )
    fit(module, data, setting)
    val, test = tables(network, data)
    found = {"anytime": anytime(test), **budgeted(val, test)}
    found["without exits"] = [alone(small_msdnet, data, setting)]
    found["plain ResNet-20"] = [alone(partial(ResNet20, width=width), data, setting) for width in arguments.widths]

    training = f"{setting.images:,} training images of CIFAR-10, {setting.epochs} epochs, seed {setting.seed}"
    table = Printed(title=f"Anytime, and plain networks; {training}")
    table.add_column("answer of")
    table.add_column("million MACs", justify="right")
    table.add_column("test accuracy", justify="right")
    for k, (macs, accuracy) in enumerate(found["anytime"], start=1):
        table.add_row(f"MSDNet, classifier {k}", f"{macs / 1e6:.2f}", f"{accuracy:.1%}")
    others = ["MSDNet without exits", *(f"ResNet-20 of width {width}" for width in arguments.widths)]
    for name, (macs, accuracy) in zip(others, [*found["without exits"], *found["plain ResNet-20"]], strict=True):
        table.add_row(name, f"{macs / 1e6:.2f}", f"{accuracy:.1%}")
    console.print(table)
    table = Printed(title=f"Budget per batch: mean million MACs, and test accuracy; {training}")
    for column in ("validation", "test, q-sweep", "", "test, calibrate", ""):
        table.add_column(column, justify="right")
    for budget, *points in zip(found["budget"], found["q-sweep"], found["calibrate"], strict=True):
        table.add_row(f"{budget[0] / 1e6:.2f}", *(x for m, a in points for x in (f"{m / 1e6:.2f}", f"{a:.1%}")))
    console.print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.figure is not None:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
