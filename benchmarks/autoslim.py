"""AutoSlim on a ResNet-20: which channels to keep for a budget of multiply-accumulates, against four other answers.

A trained network is trained on twice, as long again: for any width, and by itself. From the first come the searched
widths and the same width for every group of channels, from the second what the criteria taylor and obd leave of it. All
are tuned for as many epochs with the same optimizer: the criteria prune in the first half of them. The control "alone"
is a ResNet-20 of equal width that is trained from the beginning, for as many epochs as the others in all. Accuracies
are those of test images that neither training nor search has seen; MACs are counted, since pruning meets its budget
only roughly.

    python benchmarks/autoslim.py --dataset mnist --data data/mnist --weights weights
    python benchmarks/autoslim.py --dataset cifar10 --data data/cifar10 --weights weights --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _support import (
    Found,
    Setting,
    add_settings,
    answers,
    classifier,
    data_of,
    initial,
    parts,
    right,
    settings,
    trained,
    trainer,
)
from lightning.pytorch import seed_everything
from mnist_pruning import silence
from rich.console import Console
from torch import Tensor, nn

from lightning_compress import IterativePruningCallback, channel_groups, cut
from lightning_compress.baselines import Classifier, ResNet20, TensorLoader
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.measure.macs import count_macs
from lightning_compress.slimmable import FoundWidths, recalibrate, search_widths
from lightning_compress.slimmable.module import SlimmableWidth
from lightning_compress.slimmable.norms import take_norms

WIDTH, WIDTHS = 16, (0.25, 0.5, 0.75, 1.0)
TUNE = {"mnist": 2, "cifar10": 6}  # epochs
CRITERIA = ("taylor", "obd")
Counts = Mapping[str, int]


@dataclass
class Seed:
    """What all networks of a seed share."""

    setting: Setting
    tuning: Setting
    data: ImageData
    test: TensorLoader
    train: Tensor  # some images, for the statistics of norms
    full: nn.Module  # the network that was trained by itself
    found: Found

    @property
    def x(self) -> Tensor:
        return self.test.inputs[:2]

    def share(self, network: nn.Module) -> float:
        return count_macs(network, self.x)[0] / count_macs(self.full, self.x)[0]

    def add(self, budget: float, name: str, network: nn.Module, before: nn.Module | None = None) -> None:
        accuracy = right(answers(network, self.test.inputs), self.test.targets)
        title = f"{self.setting.dataset}, {budget:.0%} of the MACs"
        columns = {"accuracy": accuracy, "MACs": self.share(network)}
        if before is not None:
            columns["before_tuning"] = right(answers(before, self.test.inputs), self.test.targets)
        self.found.add(title, name, **columns)
        print(f"{title}, seed {self.setting.seed}, {name}: {accuracy:.2f} %, {columns['MACs']:.1%}", flush=True)


def resnet(setting: Setting, shape: Any, width: int = WIDTH) -> Classifier:
    return classifier(initial(partial(ResNet20, width=width, in_channels=shape[0]), setting), setting, shape)


def thin(network: nn.Module, counts: Counts, x: Tensor) -> nn.Module:
    """A copy with the first channels only."""
    return cut(copy.deepcopy(network), x, keep={name: range(count) for name, count in counts.items()})


def widest(seed: Seed, network: nn.Module, budget: float) -> Counts:
    """The widest equal width of all groups that keeps the budget."""
    sizes = {group.name: group.size for group in channel_groups(network, seed.x).free()}
    for part in range(64, 0, -2):
        counts = {name: max(1, round(part / 64 * size)) for name, size in sizes.items()}
        if seed.share(thin(network, counts, seed.x)) <= budget:
            return counts
    raise SystemExit(f"No width has {budget:.0%} of the MACs.")


def tuned(seed: Seed, network: nn.Module, setting: Setting, callbacks: Any = ()) -> nn.Module:
    module = classifier(copy.deepcopy(network), setting, seed.data.input_shape).to(memory_format=torch.channels_last)
    seed_everything(setting.seed, verbose=False)
    options: dict[str, Any] = {"precision": setting.precision, "callbacks": list(callbacks)}
    trainer(setting, setting.epochs, **options).fit(module, datamodule=seed.data)
    found: nn.Module = module.network
    return found.to(memory_format=torch.contiguous_format).eval()


def pruned(seed: Seed, criterion: Any, budget: float) -> nn.Module:
    """The network after pruning and tuning, with the amount of channels that met the budget in short trials."""

    def after(amount: float, setting: Setting) -> nn.Module:
        steps: dict[str, Any] = {"every_n_steps": 20, "end_epoch": setting.epochs / 2}
        pruning = IterativePruningCallback(
            amount, granularity="neuron", criterion=criterion, cost="macs", example_inputs=seed.x, **steps
        )
        return tuned(seed, seed.full, setting, [pruning])

    low, high, short = 0.0, 1.0, replace(seed.tuning, epochs=1, quick=True, lr=1e-4)  # a few batches
    for _ in range(2 if seed.setting.quick else 3):
        amount = (low + high) / 2
        low, high = (amount, high) if seed.share(after(amount, short)) > budget else (low, amount)
    found, amount = after(high, seed.tuning), high
    if abs(seed.share(found) - budget) > 0.04 and not seed.setting.quick:  # as if the share fell evenly
        again = after(min(0.95, amount * (1 - budget) / (1 - seed.share(found))), seed.tuning)
        found = min(found, again, key=lambda one: abs(seed.share(one) - budget))
    return found


def searched(network: nn.Module, val: TensorLoader, arguments: argparse.Namespace, record: Path) -> FoundWidths:
    most = arguments.held_out
    held = list(zip(val.inputs[:most].split(128), val.targets[:most].split(128), strict=True))
    start = time.process_time()
    record.parent.mkdir(parents=True, exist_ok=True)
    options = {"step": arguments.step, "norms": arguments.norms, "record": record}
    found = search_widths(network, held, budget=min(arguments.budgets), **options)
    print(f"{len(found.decisions)} steps of the search, {time.process_time() - start:.0f} s of processor time")
    return found


def one_seed(setting: Setting, arguments: argparse.Namespace, found: Found) -> None:
    mnist = setting.dataset == "mnist"
    data = data_of(setting, val_size=60_000 - arguments.images if mnist else None)
    data.setup()
    val, test = parts(data, setting)
    shape, x, kind = data.input_shape, test.inputs[:2], f"-{arguments.images}" if mnist else ""

    def after(network: nn.Module) -> Classifier:
        return classifier(copy.deepcopy(network), replace(setting, lr=arguments.tune_lr), shape)

    def universal() -> SlimmableWidth:
        return SlimmableWidth(after(first.network), WIDTHS, universal=True, network="network", example_inputs=x)

    first: Any = trained(f"plain{kind}", lambda: resnet(setting, shape), data, setting)
    plain: Any = trained(f"longer{kind}", lambda: after(first.network), data, setting)
    module: Any = trained(f"universal{kind}", universal, data, setting)
    if arguments.only == "train":
        return
    network: nn.Module = copy.deepcopy(module.network)
    take_norms(network)
    tuning = replace(setting, epochs=arguments.tune, lr=arguments.tune_lr)
    train = torch.cat([inputs for (inputs, _), _ in zip(data.train_dataloader(), range(10), strict=False)])
    seed = Seed(setting, tuning, data, test, train, plain.network, found)
    seed.add(1.0, "trained on by itself", plain.network)
    seed.add(1.0, "trained on for any width", network)
    name = "-".join(map(str, (setting.dataset, setting.seed, setting.epochs, arguments.held_out, arguments.norms)))
    search = searched(network, val, arguments, arguments.record / f"{name}{kind}.json")
    for budget in sorted(arguments.budgets, reverse=True):
        answered = {"searched": search.counts(budget), "same width": widest(seed, network, budget)}
        print(f"channels of {sum(search.sizes.values())}:", answered["searched"], flush=True)
        for name, counts in answered.items():
            start = thin(network, counts, x)
            recalibrate(start, train.split(256))
            seed.add(budget, name, tuned(seed, start, tuning), start)
        for criterion in CRITERIA:
            seed.add(budget, criterion, pruned(seed, criterion, budget))
        if arguments.alone:
            longer = replace(setting, epochs=2 * setting.epochs + tuning.epochs)
            makers: list[Callable[[], Classifier]] = [partial(resnet, longer, shape, w) for w in range(WIDTH, 0, -1)]
            make = next(make for make in makers if seed.share(make().network) <= budget)
            one: Any = trained(f"alone-{budget:g}{kind}", make, data, longer)
            seed.add(budget, "alone", one.network)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--images", type=int, default=15_000, help="of MNIST for training")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25], help="shares of the MACs")
    parser.add_argument("--tune", type=int, help="epochs of tuning; by default 2 on MNIST and 6 on CIFAR-10")
    parser.add_argument("--tune-lr", type=float, default=0.05, help="of all trainings of a trained network")
    parser.add_argument("--held-out", type=int, default=512, help="validation images of the search")
    parser.add_argument("--step", type=float, default=0.125, help="of the search")
    parser.add_argument("--norms", choices=["batch", "recalibrate"], default="batch", help="in the search")
    parser.add_argument("--no-alone", dest="alone", action="store_false", help="without networks trained alone")
    parser.add_argument("--record", type=Path, default=Path("autoslim"), help="a folder for the searches' decisions")
    arguments = parser.parse_args()
    if arguments.only == "time":
        parser.error("nothing is timed here")
    arguments.tune = 1 if arguments.quick else arguments.tune or TUNE[arguments.dataset]
    if arguments.quick:  # networks that have hardly begun to train
        arguments.lr = arguments.tune_lr = 0.01
    silence()
    torch.set_num_threads(1)
    found, console = Found(), Console(width=160)
    for setting in settings(arguments):
        one_seed(setting, arguments, found)
        found.show(console, arguments.json)


if __name__ == "__main__":
    main()
