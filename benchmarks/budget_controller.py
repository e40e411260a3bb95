"""A controller on a fixed trace: how often it keeps its budget, and how accurate it is beside static choices.

A ResNet-20 with exits, with widths, or with exits at every width serves 500 batches. The budget steps every 50 batches;
in the second half other processes load the machine. The same trace is served by the controller and by each setting
alone. "Best static" is the most accurate setting whose mean time on the trace is within the mean budget; "in hindsight"
takes for each batch the most accurate setting that kept the budget when it served this batch alone. Accuracies are
those of the served test images; the settings' own accuracies, by which the controller chooses, are those of validation
images.

    python benchmarks/budget_controller.py --dataset mnist --data data/mnist --weights weights --figure controller.png
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _support import Found, Setting, add_settings, classifier, data_of, initial, parts, settings, trained
from mnist_pruning import silence
from rich.console import Console
from torch import Tensor, nn

from lightning_compress import BudgetController, EarlyExitHeads
from lightning_compress.baselines import ResNet20
from lightning_compress.report.figure import BLUE, GREY, ORANGE, new_figure, tidy
from lightning_compress.serving import Served, measured_settings
from lightning_compress.slimmable.module import SlimmableWidth

BATCH, EACH = 64, 50
CALM, LOADED = (1.5, 0.6, 0.4, 1.1, 0.6), (1.6, 0.9, 0.6, 1.2, 0.9)  # budgets, in times of the full network's
SHARES = [share for share in (*CALM, *LOADED) for _ in range(EACH)]
AT, WIDTHS = (0.25, 0.5, 0.75), (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    time.sleep(0.5)  # until they run
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def ways(setting: Setting, arguments: argparse.Namespace, data: Any, x: Tensor) -> dict[str, nn.Module]:
    """The ways to run the trained network, by name."""

    def module() -> Any:
        network = initial(partial(ResNet20, width=16, in_channels=data.input_shape[0]), setting)
        plain: Any = classifier(network, setting, data.input_shape)
        if arguments.ways != "widths":
            plain = EarlyExitHeads(plain, list(AT), num_classes=10, network="network", example_inputs=x)
        if arguments.ways == "exits":
            return plain
        widths = WIDTHS if arguments.ways == "widths" else WIDTHS[::2]
        return SlimmableWidth(plain, widths, network="network", example_inputs=x)

    fitted: Any = trained(f"controller-{arguments.ways}", module, data, setting)
    if arguments.ways == "exits":
        fitted.calibrate(data, accuracy_drop=0.003)
    found = {point.name: point.network.eval() for point in fitted.operating_points()}
    return found | {"full network": fitted.network}


def served(
    serve: Callable[[int, Tensor], Any], batches: Sequence[tuple[Tensor, Tensor]], processes: int
) -> list[tuple[float, int]]:
    """Seconds and right answers of every batch of the trace."""
    found = []

    def half(start: int, stop: int) -> None:
        for i in range(start, stop):
            inputs, targets = batches[i]
            begin = time.perf_counter()
            with torch.no_grad():
                output = serve(i, inputs)
            found.append((time.perf_counter() - begin, int((output.argmax(1) == targets).sum())))

    half(0, len(SHARES) // 2)
    with busy(processes):
        half(len(SHARES) // 2, len(SHARES))
    return found


def draw(history: Sequence[Served], path: Path) -> None:
    """Milliseconds and budget, estimated load, and accuracy of the setting, over the batches."""
    figure = new_figure(9, 6)
    times, loads, accuracies = figure.subplots(3, sharex=True)
    times.plot([one.ms for one in history], color=BLUE, linewidth=0.8, label="taken")
    times.plot([one.budget_ms for one in history], color=ORANGE, label="budget")
    times.set(ylabel="ms per batch", yscale="log")
    times.legend(frameon=False)
    loads.plot([one.load for one in history], color=GREY)
    loads.set(ylabel="estimated load")
    accuracies.plot([100 * one.accuracy for one in history], color=BLUE)
    accuracies.set(
        ylabel="accuracy of the setting (%)", xlabel=f"batch; others load the machine from {len(history) // 2}"
    )
    for axes in (times, loads, accuracies):
        tidy(axes)
    figure.savefig(path)


def one_seed(setting: Setting, arguments: argparse.Namespace, found: Found) -> None:
    data = data_of(setting)
    data.setup()
    val, test = parts(data, setting)
    networks = ways(setting, arguments, data, test.inputs[:2])
    if arguments.only == "train":
        return
    order = torch.randperm(len(SHARES) * BATCH, generator=torch.Generator().manual_seed(0)) % len(test.inputs)
    batches = [(test.inputs[some], test.targets[some]) for some in order.split(BATCH)]
    controller = BudgetController(measured_settings(networks, val), batches[0][0], repeats=40)
    full = 1000 * max(seconds[BATCH] for seconds in controller.table.values())
    budgets = [share * full for share in SHARES]

    def controlled(i: int, inputs: Tensor) -> Any:
        controller.budget_ms = budgets[i]
        return controller(inputs)

    rows = {"controller": served(controlled, batches, arguments.processes)}
    for one in controller.settings:
        rows[one.name] = served(lambda _, inputs, run=one.run: run(inputs), batches, arguments.processes)
    static = [one.name for one in controller.settings]
    accuracy = {one.name: one.accuracy for one in controller.settings}
    hindsight = []
    for i, budget in enumerate(budgets):
        kept = [name for name in static if 1000 * rows[name][i][0] <= budget] or [static[0]]
        hindsight.append(rows[max(kept, key=lambda name: accuracy[name])][i])
    mean_budget = statistics.mean(budgets)
    affordable = [name for name in static if 1000 * statistics.mean(s for s, _ in rows[name]) <= mean_budget]
    best = max(affordable or static[:1], key=lambda name: accuracy[name])
    title = f"{setting.dataset}, {arguments.ways}: {len(budgets)} batches of {BATCH}, full network {full:.1f} ms"
    for name, of_row in {**rows, "in hindsight": hindsight}.items():
        within = [1000 * seconds <= budget for (seconds, _), budget in zip(of_row, budgets, strict=True)]
        half = len(within) // 2
        found.add(
            title,
            f"{name} (best static)" if name == best else name,
            within_budget=100 * statistics.mean(within),
            calm=100 * statistics.mean(within[:half]),
            loaded=100 * statistics.mean(within[half:]),
            accuracy=100 * sum(hits for _, hits in of_row) / len(budgets) / BATCH,
            ms=1000 * statistics.mean(seconds for seconds, _ in of_row),
        )
    names = [one.setting for one in controller.history]
    switches = sum(one != other for one, other in pairwise(names))
    busyness = os.getloadavg()[0]
    print(f"mean budget {mean_budget:.1f} ms; {switches} switches; load of the machine at the end {busyness:.1f}")
    if arguments.figure is not None:
        draw(list(controller.history), arguments.figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--ways", choices=["exits", "widths", "both"], default="exits", help="to run the network")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that load the machine")
    parser.add_argument("--figure", type=Path, help="draw the first seed's trace here")
    arguments = parser.parse_args()
    if arguments.only == "accuracy" or arguments.clock == "cpu":
        parser.error("budgets are of time by the clock on the wall")
    silence()
    torch.set_num_threads(1)
    found = Found()
    for setting in settings(arguments):
        one_seed(setting, arguments, found)
        arguments.figure = None
    found.show(Console(width=160), arguments.json)


if __name__ == "__main__":
    main()
