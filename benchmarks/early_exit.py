"""Early exits of a ResNet-20 by the clock: what they cost, what they save, and what a smaller network would give.

Three exits are placed by their share of the MACs. The network is trained alone, jointly with its exits, and frozen with
the same heads; thresholds are calibrated on validation images for an allowed drop and for budgets. Everything that is
reported is measured on test images that neither training nor calibration has seen. All passes are timed on one thread,
in turns with the eager full network: batch by batch, the median of a few rounds, summed over the batches.

The controls are each exit alone for all images, narrower ResNet-20s that are trained alone for as many epochs, images
that leave at random in the same shares, and the thresholds of MSDNet's sweep over q for the same mean cost.

    python benchmarks/early_exit.py --dataset mnist --data data/mnist --weights weights
    python benchmarks/early_exit.py --dataset cifar10 --data data/cifar10 --weights weights --only time
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from mnist_pruning import silence
from rich import box
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor, nn

from lightning_compress import EarlyExitHeads
from lightning_compress.baselines import CIFAR10, MNIST, Classifier, ResNet20, TensorLoader
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.early_exit import EarlyExitNetwork, ExitRule, Table, calibrate, evaluate, exit_costs, q_sweep
from lightning_compress.measure.macs import count_macs

WIDTH, AT = 16, (0.25, 0.5, 0.75)
EPOCHS = {"mnist": 3, "cifar10": 12}
EXITS: dict[str, dict[str, Any]] = {  # how exits are trained, by the name of the row
    "joint": {},
    "frozen": {"train": "frozen"},
    "rising": {"weights": "rising"},
    "equilibrium": {"gradient": "equilibrium"},
    "distill": {"distill": 0.5},
}

WANTED: dict[str, dict[str, Any]] = {
    "drop of 0.3 points": {"accuracy_drop": 0.003},
    "budget of 0.3": {"budget": 0.3, "unit": "share"},
    "budget of 0.5": {"budget": 0.5, "unit": "share"},
}
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7)  # of the sweep, as shares of the full network's MACs
EVERY, RULES = "Test accuracy of every exit, and of networks trained alone", "Under thresholds, on the test images"
SWEEP, TIMES = "MSDNet's sweep over q, and ours for the same budget", "Times, as shares of the eager full network's"
STEPS = "A training step"


@dataclass(frozen=True)
class Setting:
    """How every network is trained, and on what."""

    dataset: str
    epochs: int
    batch: int
    lr: float
    precision: Any
    seed: int
    at: tuple[float, ...]
    weights: Path | None
    quick: bool


def data_of(setting: Setting, folder: str) -> ImageData:
    common: dict[str, Any] = {"batch_size": setting.batch, "seed": setting.seed}
    if setting.dataset == "mnist":
        return MNIST(folder, val_size=5000, **common)
    return CIFAR10(folder, val_size=4000, flip=True, shift=4, **common)


def trainer(setting: Setting, epochs: int, **options: Any) -> Trainer:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    few: dict[str, Any] = {"limit_train_batches": 20} if setting.quick else {}
    given = silent | few | {"limit_val_batches": 0, "enable_model_summary": False} | options
    return Trainer(accelerator="cpu", max_epochs=epochs, **given)


def classifier(setting: Setting, shape: Sequence[int], width: int = WIDTH, **recipe: Any) -> Classifier:
    """A ResNet-20 from the seed's initial weights."""
    seed_everything(setting.seed, verbose=False)
    network = ResNet20(width=width, in_channels=shape[0])
    given: dict[str, Any] = {"optimizer": "sgd", "lr": setting.lr, "weight_decay": 1e-4, "warmup": 0.1} | recipe
    return Classifier(network, input_shape=shape, **given)


def trained(name: str, make: Callable[[], LightningModule], data: ImageData, setting: Setting) -> LightningModule:
    """Return a module with the weights of the folder, or train it and write them there."""
    module, path = make(), None
    if setting.weights is not None:
        places = "-".join(["", *map(str, setting.at)]) if name in EXITS and setting.at != AT else ""
        path = setting.weights / f"{setting.dataset}-{setting.seed}-{setting.epochs}-{name}{places}.pt"
        if path.exists():
            module.load_state_dict(torch.load(path))
            return module.eval()
    start = time.perf_counter()
    fitted = copy.deepcopy(module).to(memory_format=torch.channels_last)  # trains faster; keeps no other trace
    seed_everything(setting.seed, verbose=False)
    epochs = max(1, setting.epochs // 3) if name == "frozen" else setting.epochs
    trainer(setting, epochs, precision=setting.precision).fit(fitted, datamodule=data)
    print(f"{setting.dataset}, seed {setting.seed}: {name} trained in {time.perf_counter() - start:.0f} s", flush=True)
    module.load_state_dict(fitted.state_dict())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), path)
    return module.eval()


def with_exits(name: str, plain: nn.Module, shape: Sequence[int], setting: Setting) -> EarlyExitHeads:
    """A network with three exits: from the initial weights, or from those of the network trained alone."""
    if name != "frozen":
        module = classifier(setting, shape)
    else:  # heads alone diverge at the learning rate of the network, whose features they can't change
        module = classifier(setting, shape, optimizer="adam", lr=1e-3, weight_decay=0.0)
        module.network.load_state_dict(plain.state_dict())
    return EarlyExitHeads(module, list(setting.at), num_classes=10, network="network", **EXITS[name])


def networks(
    data: ImageData, setting: Setting, exits: Sequence[str], widths: Sequence[int]
) -> tuple[nn.Module, dict[str, EarlyExitHeads], dict[int, nn.Module]]:
    """The network trained alone, those with exits by how they were trained, and narrower ones by width."""
    shape = data.input_shape
    plain: Any = trained("plain", lambda: classifier(setting, shape), data, setting)
    early: dict[str, Any] = {
        name: trained(name, lambda name=name: with_exits(name, plain.network, shape, setting), data, setting)
        for name in exits
    }
    narrow: dict[int, Any] = {
        width: trained(f"width{width}", lambda width=width: classifier(setting, shape, width), data, setting)
        for width in widths
    }
    return plain.network, early, {width: one.network for width, one in narrow.items()}


class Found:
    """Numbers by table, row and column, one for each seed; accuracies and shares of samples in per cent."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, dict[str, list[float]]]] = {}

    def add(self, table: str, row: str, **columns: float) -> None:
        for column, value in columns.items():
            rows = self.tables.setdefault(table, {})
            rows.setdefault(row, {}).setdefault(column.replace("_", " "), []).append(value)

    def show(self, console: Console) -> None:
        for title, rows in self.tables.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            table = Printed("", box=box.MARKDOWN, title=title, title_justify="left")
            for column in columns:
                table.add_column(column, justify="right")
            for name, row in rows.items():
                medians = {column: statistics.median(values) for column, values in row.items()}
                table.add_row(name, *(f"{medians[column]:.2f}" if column in medians else "" for column in columns))
            console.print(table)


def parts(data: ImageData, setting: Setting) -> tuple[TensorLoader, TensorLoader]:
    """The validation and the test images; fewer of them in a quick run."""
    found = []
    for part in (data.val_dataloader(), data.test_dataloader()):
        assert isinstance(part, TensorLoader)
        most = 640 if setting.quick else None
        found.append(TensorLoader(part.inputs[:most], part.targets[:most], batch_size=500))
    return found[0], found[1]


def calibrated(module: EarlyExitHeads, val: TensorLoader) -> dict[str, EarlyExitNetwork]:
    """What runs under the thresholds of an allowed drop and of budgets."""
    found = {}
    for name, wanted in WANTED.items():
        module.calibrate(val, **wanted)
        found[name] = module.deploy()
    return found


def costs(early: EarlyExitNetwork) -> Tensor:
    """The MACs of leaving at each exit, those of the heads that run included, as a share of the full network's."""
    rule = early.rule
    assert rule is not None
    used = [k for k in rule.open if k not in early.left_out]
    return torch.tensor(exit_costs(rule.stages, rule.heads, used)) / sum(rule.stages)


def table_of(early: EarlyExitNetwork, loader: TensorLoader) -> Table:
    rule = early.rule
    assert rule is not None
    exits = range(1, len(rule.stages) + 1)
    with torch.no_grad():
        logits = [torch.cat([early(x, exit=k)[0] for x in loader.inputs.split(500)]) for k in exits]
    return Table(logits=logits, targets=loader.targets, stages=rule.stages, heads=rule.heads)


def right(logits: Tensor, targets: Tensor) -> float:
    return 100 * float((logits.argmax(1) == targets).float().mean())


def accuracy(
    plain: nn.Module,
    exits: dict[str, dict[str, EarlyExitNetwork]],
    narrow: dict[int, nn.Module],
    val: TensorLoader,
    test: TensorLoader,
    found: Found,
) -> None:
    """The accuracies of every exit and under every rule, on the test images."""
    with torch.no_grad():
        alone = {f"width {w}": torch.cat([one(x) for x in test.inputs.split(500)]) for w, one in narrow.items()}
        alone["alone"] = torch.cat([plain(x) for x in test.inputs.split(500)])
    for name in reversed(alone):
        found.add(EVERY, name, full=right(alone[name], test.targets))
    of_plain = right(alone["alone"], test.targets)
    for name, networks in exits.items():
        first = next(iter(networks.values()))
        table = table_of(first, test)
        each = [right(logits, test.targets) for logits in table.logits]
        found.add(EVERY, name, **{f"exit_{k}": one for k, one in enumerate(each[:-1], 1)}, full=each[-1])
        found.add(EVERY, name, last_less_alone=each[-1] - of_plain)
        for wanted, early in networks.items():
            with torch.no_grad():
                answers = [early(x) for x in test.inputs.split(64)]
            reached, index = (
                right(torch.cat([one for one, _ in answers]), test.targets),
                torch.cat([k for _, k in answers]),
            )
            shares = index.bincount(minlength=len(each)) / len(index)
            spent, budget = float(shares @ costs(early).float()), WANTED[wanted].get("budget")
            found.add(
                RULES,
                f"{name}, {wanted}",
                accuracy=reached,
                less_full=reached - each[-1],
                less_alone=reached - of_plain,
                MACs=spent,
                **({} if budget is None else {"MACs_/_budget": spent / budget}),
                leaving_at_random=float(shares @ torch.tensor(each)),
                **{f"at_{k}": 100 * float(share) for k, share in enumerate(shares, 1)},
            )
        if name == next(iter(exits)):
            sweep(table_of(first, val), table, found)


def sweep(val: Table, test: Table, found: Found) -> None:
    """The thresholds of MSDNet's sweep, and ours for the same mean cost of the validation images."""
    swept, full = q_sweep(val), sum(val.stages)
    for share in BUDGETS:
        one = min(swept, key=lambda one: abs(one.mean_cost - share * full))
        paper = ExitRule(rule="confidence", thresholds=one.thresholds, temperatures=(1.0,) * len(val.stages))
        columns = {"budget": one.mean_cost / full}
        for name, rule in (("q-sweep", paper), ("ours", calibrate(val, budget=one.mean_cost))):
            outcome = evaluate(test, rule)
            columns |= {f"MACs,_{name}": outcome.mean_cost / full, f"accuracy,_{name}": 100 * outcome.accuracy}
        found.add(SWEEP, f"near {share}", **columns)


def times(
    ways: dict[str, Callable[[Tensor], Any]], batches: Sequence[Tensor], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every batch: in turns, the median of the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    with torch.no_grad():
        for way in ways.values():
            for batch in batches[:3]:
                way(batch)
        for batch in batches:
            of_batch: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name in order.sample(list(ways), len(ways)):
                    start = clock()
                    ways[name](batch)
                    of_batch[name].append(clock() - start)
            for name, rounds_of_it in of_batch.items():
                seconds[name].append(statistics.median(rounds_of_it))
    return seconds


def timing(
    plain: nn.Module,
    networks: dict[str, EarlyExitNetwork],
    narrow: dict[int, nn.Module],
    test: TensorLoader,
    arguments: argparse.Namespace,
    found: Found,
) -> None:
    """Times of all ways to run the network, and of narrower ones, with the MACs that were executed."""
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    early, networks = next(iter(networks.values())), dict(networks)
    rule = early.rule
    assert rule is not None
    for name, threshold in (("nobody leaves, closed", math.inf), ("nobody leaves, never sure", 2.0)):
        networks[name] = copy.deepcopy(early)
        networks[name].left_out = ()
        networks[name].rule = replace(rule, thresholds=(threshold,) * len(early.exits))
    static = {f"exit {k} alone": early.static(k) for k in range(1, len(early.exits) + 1)}
    smaller = {f"width {width}": one for width, one in narrow.items()}
    ways: dict[str, Callable[[Tensor], Any]] = {"full network": plain, **networks, **static, **smaller}
    example, full_macs = test.inputs[:1], sum(rule.stages)
    for name, network in {**static, **smaller}.items():
        found.add(TIMES, name, MACs_at_64=count_macs(network, example)[0] / full_macs)
    order = torch.randperm(len(test.inputs), generator=torch.Generator().manual_seed(0))
    measured: dict[str, float] = {}
    for size, count, rounds in ((64, 2, 1), (1, 10, 1)) if arguments.quick else ((64, 40, 3), (1, 300, 3)):
        batches = test.inputs[order[: size * count]].split(size)
        seconds = times(ways, batches, rounds, clock)
        full = sum(seconds["full network"])
        measured = {name: sum(of_batches) / full for name, of_batches in seconds.items()}
        found.add(TIMES, "full network", **{f"ms_at_{size}": 1000 * full / count})
        for name, of_batches in seconds.items():
            found.add(TIMES, name, **{f"time_at_{size}": measured[name]})
            if size == 1:
                typical = statistics.median(of_batches) / statistics.median(seconds["full network"])
                found.add(TIMES, name, median_at_1=typical)
            if name in networks:
                with torch.no_grad():
                    index = torch.cat([networks[name](batch)[1] for batch in batches])
                share, each = float(costs(networks[name])[index].mean()), index.bincount(minlength=len(static) + 1)
                alone = [*(measured[way] for way in static), 1.0]
                ideal = sum(float(n) * way for n, way in zip(each / len(index), alone, strict=True))
                found.add(TIMES, name, **{f"MACs_at_{size}": share, f"time_/_MACs_at_{size}": measured[name] / share})
                found.add(TIMES, name, **{f"time_/_static_at_{size}": measured[name] / ideal})
        if size == 64 and narrow:
            for name in WANTED:
                width = min(narrow, key=lambda width: abs(measured[f"width {width}"] - measured[name]))
                found.add(TIMES, name, width_of_equal_time=width)


class Stopwatch(Callback):
    """Notes the seconds of every training step: forward, backward and optimizer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, list[float]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds.append(-self.clock())

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds[-1] += self.clock()


def training_step(exits: Sequence[str], data: ImageData, setting: Setting, arguments: Any, found: Found) -> None:
    """Seconds of a training step, the median over short fits in turns, divided by those of the plain network."""
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    plain = classifier(setting, data.input_shape)
    seconds: dict[str, list[float]] = {"alone": [], **{name: [] for name in exits}}
    for _ in range(1 if arguments.quick else 4):
        for name, of_steps in seconds.items():
            watch = Stopwatch(clock)
            module = (
                copy.deepcopy(plain) if name == "alone" else with_exits(name, plain.network, data.input_shape, setting)
            )
            trainer(setting, 1, limit_train_batches=9, callbacks=[watch]).fit(module, datamodule=data)
            of_steps += watch.seconds[2:]
    for name, of_steps in seconds.items():
        median = statistics.median(of_steps)
        found.add(STEPS, name, ms=1000 * median, by_that_alone=median / statistics.median(seconds["alone"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(EPOCHS), default="mnist")
    parser.add_argument("--data", help="the folder of its files; by default data/mnist or data/cifar10")
    parser.add_argument("--epochs", type=int, help="by default 3 on MNIST and 12 on CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--precision", default="bf16-mixed", help="of training")
    parser.add_argument("--exits", nargs="*", choices=list(EXITS), default=["joint", "frozen"], help="how they train")
    parser.add_argument("--at", type=float, nargs="+", default=list(AT), help="the exits' shares of the MACs")
    parser.add_argument("--widths", type=int, nargs="*", default=[4, 6, 8, 11], help="of the narrower networks")
    parser.add_argument("--weights", type=Path, help="a folder to which weights are written, or from which they come")
    parser.add_argument("--only", choices=["train", "accuracy", "time"])
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that does other things"
    )
    parser.add_argument("--json", type=Path, help="write the numbers of all seeds here as well")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    console, found = Console(width=200), Found()
    for seed in arguments.seeds:
        setting = Setting(
            dataset=arguments.dataset,
            epochs=1 if arguments.quick else arguments.epochs or EPOCHS[arguments.dataset],
            batch=arguments.batch,
            lr=arguments.lr,
            precision=arguments.precision,
            seed=seed,
            at=tuple(arguments.at),
            weights=None if arguments.quick else arguments.weights,
            quick=arguments.quick,
        )
        data = data_of(setting, arguments.data or f"data/{setting.dataset}")
        data.setup()
        plain, exits, narrow = networks(data, setting, arguments.exits, arguments.widths)
        if arguments.only == "train":
            continue
        timed = arguments.only != "accuracy" and seed == arguments.seeds[0]
        val, test = parts(data, setting)
        needed = arguments.exits[:1] if arguments.only == "time" else arguments.exits
        early = {name: calibrated(exits[name], val) for name in needed}
        if arguments.only != "time":
            accuracy(plain, early, narrow, val, test, found)
        if timed:
            timing(plain, early[needed[0]], narrow, test, arguments, found)
            training_step(arguments.exits, data, setting, arguments, found)
    console.print(f"{arguments.dataset}: {setting.epochs} epochs, seeds {arguments.seeds}; times of the first seed")
    found.show(console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found.tables, indent=1))


if __name__ == "__main__":
    main()
