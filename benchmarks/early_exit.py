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
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
    initial,
    parts,
    right,
    settings,
    step_seconds,
    times,
    trained,
)
from mnist_pruning import silence
from rich.console import Console
from torch import Tensor, nn

from lightning_compress import EarlyExitHeads
from lightning_compress.baselines import Classifier, ResNet20, TensorLoader
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.early_exit import EarlyExitNetwork, ExitRule, Table, calibrate, evaluate, exit_costs, q_sweep
from lightning_compress.measure.macs import count_macs

WIDTH, AT = 16, (0.25, 0.5, 0.75)
EXITS: dict[str, dict[str, Any]] = {  # how exits are trained, by the name of the row
    "joint": {"weights": "equal"},
    "frozen": {"train": "frozen"},
    "rising": {"weights": "rising"},
    "equilibrium": {"weights": "equal", "gradient": "equilibrium"},
    "distill": {"weights": "equal", "distill": 0.5},
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


def resnet(setting: Setting, shape: Sequence[int], width: int = WIDTH, **recipe: Any) -> Classifier:
    """A ResNet-20 from the seed's initial weights."""
    return classifier(initial(partial(ResNet20, width=width, in_channels=shape[0]), setting), setting, shape, **recipe)


def with_exits(
    name: str, plain: nn.Module, shape: Sequence[int], setting: Setting, at: Sequence[float]
) -> EarlyExitHeads:
    """A network with three exits: from the initial weights, or from those of the network trained alone."""
    if name != "frozen":
        module = resnet(setting, shape)
    else:  # heads alone diverge at the learning rate of the network, whose features they can't change
        module = resnet(setting, shape, optimizer="adam", lr=1e-3, weight_decay=0.0)
        module.network.load_state_dict(plain.state_dict())
    return EarlyExitHeads(module, list(at), num_classes=10, network="network", **EXITS[name])


def networks(
    data: ImageData, setting: Setting, exits: Sequence[str], at: Sequence[float], widths: Sequence[int]
) -> tuple[nn.Module, dict[str, EarlyExitHeads], dict[int, nn.Module]]:
    """The network trained alone, those with exits by how they were trained, and narrower ones by width."""
    shape = data.input_shape
    plain: Any = trained("plain", lambda: resnet(setting, shape), data, setting)
    places = "" if tuple(at) == AT else "-".join(["", *map(str, at)])
    early: dict[str, Any] = {
        name: trained(
            f"{name}{places}",
            partial(with_exits, name, plain.network, shape, setting, at),
            data,
            setting,
            epochs=max(1, setting.epochs // 3) if name == "frozen" else None,
        )
        for name in exits
    }
    narrow: dict[int, Any] = {
        width: trained(f"width{width}", partial(resnet, setting, shape, width), data, setting) for width in widths
    }
    return plain.network, early, {width: one.network for width, one in narrow.items()}


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
    logits = [answers(lambda x, k=k: early(x, exit=k)[0], loader.inputs) for k in exits]
    return Table(logits=logits, targets=loader.targets, stages=rule.stages, heads=rule.heads)


def accuracy(
    plain: nn.Module,
    exits: dict[str, dict[str, EarlyExitNetwork]],
    narrow: dict[int, nn.Module],
    val: TensorLoader,
    test: TensorLoader,
    found: Found,
) -> None:
    """The accuracies of every exit and under every rule, on the test images."""
    alone = {f"width {w}": answers(one, test.inputs) for w, one in narrow.items()}
    alone["alone"] = answers(plain, test.inputs)
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
                found_by = [early(x) for x in test.inputs.split(64)]
            reached = right(torch.cat([one for one, _ in found_by]), test.targets)
            index = torch.cat([k for _, k in found_by])
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


def timing(
    plain: nn.Module,
    networks: dict[str, EarlyExitNetwork],
    narrow: dict[int, nn.Module],
    test: TensorLoader,
    setting: Setting,
    clock: Callable[[], float],
    found: Found,
) -> None:
    """Times of all ways to run the network, and of narrower ones, with the MACs that were executed."""
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
    for size, count, rounds in ((64, 2, 1), (1, 10, 1)) if setting.quick else ((64, 40, 3), (1, 300, 3)):
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


def training_step(
    exits: Sequence[str],
    at: Sequence[float],
    data: ImageData,
    setting: Setting,
    clock: Callable[[], float],
    found: Found,
) -> None:
    """Seconds of a training step, divided by those of the plain network."""
    shape = data.input_shape
    plain = resnet(setting, shape)
    makers: dict[str, Any] = {"alone": lambda: copy.deepcopy(plain)}
    makers |= {name: partial(with_exits, name, plain.network, shape, setting, at) for name in exits}
    seconds = step_seconds(makers, data, setting, clock)
    for name, of_step in seconds.items():
        found.add(STEPS, name, ms=1000 * of_step, by_that_alone=of_step / seconds["alone"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--exits", nargs="*", choices=list(EXITS), default=["joint", "frozen"], help="how they train")
    parser.add_argument("--at", type=float, nargs="+", default=list(AT), help="the exits' shares of the MACs")
    parser.add_argument("--widths", type=int, nargs="*", default=[4, 6, 8, 11], help="of the narrower networks")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    console, found, at = Console(width=200), Found(), arguments.at
    for setting in settings(arguments):
        data = data_of(setting)
        data.setup()
        plain, exits, narrow = networks(data, setting, arguments.exits, at, arguments.widths)
        if arguments.only == "train":
            continue
        timed = arguments.only != "accuracy" and setting.seed == arguments.seeds[0]
        val, test = parts(data, setting)
        needed = arguments.exits[:1] if arguments.only == "time" else arguments.exits
        early = {name: calibrated(exits[name], val) for name in needed}
        if arguments.only != "time":
            accuracy(plain, early, narrow, val, test, found)
        if timed:
            clock = clock_of(arguments)
            timing(plain, early[needed[0]], narrow, test, setting, clock, found)
            training_step(arguments.exits, at, data, setting, clock, found)
    console.print(f"{arguments.dataset}: {setting.epochs} epochs, seeds {arguments.seeds}; times of the first seed")
    found.show(console, arguments.json)


if __name__ == "__main__":
    main()
