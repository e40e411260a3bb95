"""The five blocks of cheaper convolutions in a trained ResNet-20, and how they begin: accuracy, size and time.

Every 3x3 convolution but the first becomes a block. Each block begins in three ways: fitted to what the layer computes
for real inputs ("data"), to its weight alone ("svd"), or at random; then the statistics of the batch norms are computed
anew, and the network trains on, each time with a learning rate that falls to zero.

Parameters and multiply-accumulates (MACs) are shares of the network's. "by formula": the parameters by the formula of
the block, as a share of those that are counted. Times: in turns on one thread, the median over batches, as a share of
the plain network's; "by share" divides by the share of MACs, so that 1.0 would be time in proportion.

    python benchmarks/conv_substitution.py --dataset cifar10 --data data/cifar10 --weights weights
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
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
from torch import Tensor, nn

from lightning_compress import substitute_convs
from lightning_compress.baselines import Classifier, ResNet20
from lightning_compress.measure.macs import count_macs

ACCURACY, SIZES = "Test accuracy after some epochs", "Sizes and times"
LAYERS = "One 3x3 convolution: how many times faster each block is"
BLOCKS: dict[str, dict[str, Any]] = {
    "separable": {"block": "separable"},
    "separable, 2 terms": {"block": "separable", "multiplier": 2},
    "xception": {"block": "xception"},
    "fire": {"block": "fire"},
    "fire, half": {"block": "fire", "squeeze": 0.5},
    "ghost": {"block": "ghost"},
    "shuffle": {"block": "shuffle"},
}


def parameters(network: nn.Module) -> int:
    return sum(one.numel() for one in network.parameters())


def resnet(setting: Setting, shape: Sequence[int], width: int) -> Classifier:
    """A ResNet-20 from the seed's initial weights."""
    return classifier(initial(partial(ResNet20, width=width, in_channels=shape[0]), setting), setting, shape)


def begun(plain: nn.Module, batches: Sequence[Tensor], init: str, options: dict[str, Any], seed: int) -> nn.Module:
    """A copy of the network with blocks, before any training."""
    network = copy.deepcopy(plain)
    torch.manual_seed(seed)
    substitute_convs(network, batches[0], init=init, batches=batches, **options)  # type: ignore[arg-type]
    return network


def predicted(plain: nn.Module, batch: Tensor, options: dict[str, Any]) -> int:
    """The number of parameters that the formulas say."""
    report = substitute_convs(copy.deepcopy(plain), batch, init="random", **options)
    return parameters(plain) - sum(one.before - one.after for one in report.replaced.values())


def one_seed(setting: Setting, arguments: argparse.Namespace, found: Found) -> None:
    data = data_of(setting)
    data.setup()
    _, test = parts(data, setting)
    shape: Any = data.input_shape
    named = "plain" if arguments.width == 16 else f"width{arguments.width}"
    start: Any = trained(named, partial(resnet, setting, shape, arguments.width), data, setting)
    plain: nn.Module = start.network
    loader = iter(data.train_dataloader())
    batches = [next(loader)[0] for _ in range(arguments.n_batches)]
    tuning = replace(setting, lr=arguments.tune_lr, images=arguments.images)
    fewer = data_of(tuning)

    def tested(name: str, column: str, network: nn.Module) -> None:
        accuracy = right(answers(network.eval(), test.inputs), test.targets)
        found.add(ACCURACY, name, **{column: accuracy})
        print(f"{setting.dataset}, seed {setting.seed}, {name}, {column}: {accuracy:.2f} %", flush=True)

    def train_on(name: str, network: nn.Module) -> None:
        tested(name, "0", network)
        for epochs in arguments.tune:
            one = classifier(copy.deepcopy(network), tuning, shape)
            if "ghost" not in name:  # others train faster like this
                one = one.to(memory_format=torch.channels_last)
            fit(one, fewer, replace(tuning, epochs=epochs))
            tested(name, f"{epochs}", one.network)

    deployed = {name: begun(plain, batches, "svd", BLOCKS[name], setting.seed) for name in arguments.blocks}
    if setting.seed == arguments.seeds[0]:
        sizes(plain, deployed, test.inputs, batches[0], setting, arguments, found)
    if arguments.only == "time":
        return
    if arguments.control:
        train_on("the network as it was", plain)
    for name in arguments.blocks:
        for init in arguments.inits:
            train_on(f"{name}: {init}", begun(plain, batches, init, BLOCKS[name], setting.seed))


def sizes(
    plain: nn.Module,
    deployed: dict[str, nn.Module],
    images: Tensor,
    batch: Tensor,
    setting: Setting,
    arguments: argparse.Namespace,
    found: Found,
) -> None:
    whole = count_macs(plain, images[:1])[0]
    shares = {name: count_macs(network, images[:1])[0] / whole for name, network in deployed.items()}
    for name, network in deployed.items():
        counted = parameters(network)
        formula = predicted(plain, batch, BLOCKS[name]) / counted
        found.add(SIZES, name, parameters=counted / parameters(plain), by_formula=formula, MACs=shares[name])
    if arguments.only == "accuracy":
        return
    layers(setting, arguments, found)
    for size, count, rounds in ((64, 2, 1), (1, 10, 1)) if setting.quick else ((64, 15, 3), (1, 100, 3)):
        seconds = {
            name: statistics.median(of_batches)
            for name, of_batches in times(
                {"plain": plain, **deployed}, images[: size * count].split(size), rounds, clock_of(arguments)
            ).items()
        }
        for name in deployed:
            share = seconds[name] / seconds["plain"]
            found.add(SIZES, name, **{f"time at {size}": share, f"by share at {size}": share / shares[name]})


def layers(setting: Setting, arguments: argparse.Namespace, found: Found) -> None:
    """Times of single convolutions of the sizes of a ResNet-18, as blocks."""
    for channels, size in ((64, 56), (128, 28), (256, 14)):
        images = torch.randn(16 if setting.quick else 40, channels, size, size)
        plain = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False)).eval()
        ways = {name: begun(plain, [images[:1]], "random", BLOCKS[name], 0) for name in arguments.blocks}
        seconds = times({"plain": plain, **ways}, images.split(4), 3, clock_of(arguments))
        for name in ways:
            faster = statistics.median(seconds["plain"]) / statistics.median(seconds[name])
            found.add(LAYERS, name, **{f"{channels} at {size}": faster})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--inits", nargs="+", default=["data", "svd", "random"])
    parser.add_argument("--tune", type=int, nargs="*", default=[1, 5], help="epochs of training after it")
    parser.add_argument("--tune-lr", type=float, default=0.05)
    parser.add_argument("--images", type=int, help="of these epochs; by default all training images")
    parser.add_argument("--n-batches", type=int, default=8, help="for the fits and the norms")
    parser.add_argument("--no-control", dest="control", action="store_false")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tune, arguments.n_batches = [1], 2
    silence()
    torch.set_num_threads(1)
    found, console = Found(), Console(width=200)
    for setting in settings(arguments):
        one_seed(setting, arguments, found)
    found.show(console, arguments.json)


if __name__ == "__main__":
    main()
