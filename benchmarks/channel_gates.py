"""Channels that each sample chooses, beside as many for all samples: accuracy at a share of the channels, and time.

From one trained network, tuned for the same epochs: gates; gates whose channels are drawn at random; the network
without the channels of the smallest magnitudes; and a narrower network of as many MACs, trained alone for all of these
epochs.
MACs: of one sample, gates included. Times: the plain network, the one with gates as it trains, the deployed one as it
chooses to run here, the deployed one that computes chosen channels alone whatever it costs, and the cut network, in
turns; then the same for plain networks of other widths with random weights.

    python benchmarks/channel_gates.py --dataset mnist --data data/mnist --weights weights
    python benchmarks/channel_gates.py --only time --clock cpu
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
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
    times,
    trained,
)
from mnist_pruning import silence
from rich.console import Console
from torch import Tensor, nn

from lightning_compress import ChannelGates, channel_groups, cut
from lightning_compress.baselines import Classifier, DigitsConvNet, ResNet20
from lightning_compress.channel_gates.find import find_layers
from lightning_compress.channel_gates.gates import LayerGates, gates_of
from lightning_compress.channel_gates.kinds import count_at
from lightning_compress.channel_gates.making import give_gates
from lightning_compress.channel_gates.network import ChannelGatedNetwork
from lightning_compress.measure.macs import count_macs
from lightning_compress.slimmable.order import magnitudes

WIDTH = 16
ACCURACY = "Test accuracy at a share of the channels"
CHOICE = "How the choice differs between samples"
TIMES = "Time, as shares of the plain network's"
WIDE = "Time of plain networks of four convolutions, as shares of the plain network's"


def resnet(setting: Setting, shape: Any, width: int = WIDTH, lr: float | None = None) -> Classifier:
    make = partial(ResNet20, width=width, in_channels=shape[0])
    return classifier(initial(make, setting), setting, shape, **({} if lr is None else {"lr": lr}))


def after(network: nn.Module, setting: Setting, shape: Any, lr: float) -> Classifier:
    """A module with a copy of a trained network, to be tuned."""
    return classifier(copy.deepcopy(network), setting, shape, lr=lr)


def without(network: nn.Module, share: float, x: Tensor) -> nn.Module:
    """A copy of a network without those channels of the layers with gates that have the smallest magnitudes."""
    thin = copy.deepcopy(network)
    names = {layer.name for layer in find_layers(thin, x).layers}
    groups = [group for group in channel_groups(thin, x) if group.name in names]
    keep = {
        name: score.argsort(descending=True, stable=True)[: count_at(share, len(score))].sort().values
        for name, score in magnitudes(thin, groups).items()
    }
    cut(thin, x, keep=keep)
    return thin


def narrower(shape: Any, macs: float) -> int:
    """The width of a ResNet-20 of as many MACs."""
    x = torch.zeros(1, *shape)
    counts = {width: count_macs(ResNet20(width=width, in_channels=shape[0]).eval(), x)[0] for width in range(4, WIDTH)}
    return min(counts, key=lambda width: abs(counts[width] - macs))


def ways_of(network: nn.Module, batch: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """The ways to run a network with gates, by name."""
    return {
        "with hooks": network,
        "deployed": ChannelGatedNetwork(network, batch),
        "chosen alone": ChannelGatedNetwork(network, batch, min_gain=None),
    }


def timing(
    table: str,
    row: str,
    plain: nn.Module,
    others: Callable[[Tensor], dict[str, Callable[[Tensor], Any]]],
    images: Tensor,
    arguments: argparse.Namespace,
    found: Found,
) -> None:
    clock = clock_of(arguments)
    for size, count, rounds in ((64, 2, 1), (1, 10, 1)) if arguments.quick else ((64, 15, 3), (1, 150, 3)):
        batches = images[: size * count].split(size)
        ways = {"plain": plain} | others(batches[0])
        seconds = {name: statistics.median(some) for name, some in times(ways, batches, rounds, clock).items()}
        found.add(table, row, **{f"plain, ms at {size}": 1000 * seconds["plain"]})
        for name in list(ways)[1:]:
            found.add(table, row, **{f"{name} at {size}": seconds[name] / seconds["plain"]})


def other_widths(images: Tensor, arguments: argparse.Namespace, found: Found) -> None:
    """Times of networks with random weights and random gates."""
    for width in (16, 64) if arguments.quick else (16, 32, 64, 128):
        torch.manual_seed(0)
        plain = DigitsConvNet(width=width, in_channels=images.shape[1], image_size=images.shape[2]).eval()
        network = copy.deepcopy(plain)
        gates = LayerGates(find_layers(network, images[:2]).layers, arguments.share)
        for gate in gates.by_layer().values():
            nn.init.normal_(gate.weight)
        give_gates(network, gates.eval())
        timing(WIDE, f"width {width}", plain, partial(ways_of, network), images, arguments, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--share", type=float, default=0.5, help="of the channels that a sample keeps")
    parser.add_argument("--tune", type=int, default=2, help="epochs from the trained network")
    parser.add_argument("--tune-lr", type=float, default=0.02)
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    console, found = Console(width=200), Found()
    tune = 1 if arguments.quick else arguments.tune
    for setting in settings(arguments):
        data = data_of(setting)
        data.setup()
        shape, share = data.input_shape, arguments.share
        x = torch.zeros(2, *shape)
        _, test = parts(data, setting)
        plain: Any = trained("plain", partial(resnet, setting, shape), data, setting)

        def gated(way: Any, plain: Any = plain, setting: Setting = setting, shape: Any = shape) -> Any:
            x = torch.zeros(2, *shape)
            tuned = after(plain.network, setting, shape, arguments.tune_lr)
            module = ChannelGates(tuned, share=arguments.share, network="network", example_inputs=x)
            gates = gates_of(module.network)
            assert gates is not None
            gates.way = way
            return module

        def thin(plain: Any = plain, setting: Setting = setting, shape: Any = shape) -> Classifier:
            x = torch.zeros(2, *shape)
            return after(without(plain.network, arguments.share, x), setting, shape, arguments.tune_lr)

        end = f"{share:g}-{tune}-{arguments.tune_lr:g}"
        modules: dict[str, Any] = {
            "gates": trained(f"channel-gates-{end}", partial(gated, "gates"), data, setting, epochs=tune),
            "random channels": trained(f"channel-random-{end}", partial(gated, "random"), data, setting, epochs=tune),
            "cut by magnitude": trained(f"channel-cut-{end}", thin, data, setting, epochs=tune),
        }
        few = count_macs(ChannelGatedNetwork(modules["gates"].network, x, min_gain=None), x[:1])[0]
        full = count_macs(plain.network, x[:1])[0]
        if arguments.only != "time":
            width = narrower(shape, few)
            long = setting.epochs + tune
            alone = trained(f"width{width}-{long}", partial(resnet, setting, shape, width), data, setting, epochs=long)
            modules = {"plain, not tuned": plain} | modules | {f"width {width}, alone": alone}
            for name, module in modules.items():
                network = module.network
                macs = few if gates_of(network) is not None else count_macs(network, x[:1])[0]
                reached = right(answers(network, test.inputs), test.targets)
                found.add(ACCURACY, name, accuracy=reached, MACs_of_the_plain_one=macs / full)
            gates = gates_of(modules["gates"].network)
            assert gates is not None
            with gates.running("static"):
                reached = right(answers(modules["gates"].network, test.inputs), test.targets)
            found.add(ACCURACY, "gates, the channels kept most often, not tuned", accuracy=reached)
            choice(modules["gates"].network, test.inputs, found)
        if arguments.only != "accuracy" and setting.seed == arguments.seeds[0]:
            thin_network = modules["cut by magnitude"].network

            def others(batch: Tensor, network: Any = modules["gates"].network, thin: Any = thin_network) -> Any:
                return ways_of(network, batch) | {"cut": thin}

            timing(TIMES, f"ResNet-20, width {WIDTH}", plain.network, others, test.inputs, arguments, found)
            other_widths(test.inputs, arguments, found)
    console.print(f"{arguments.dataset}: {tune} epochs of tuning, seeds {arguments.seeds}; times of the first seed")
    found.show(console, arguments.json)


def choice(network: nn.Module, images: Tensor, found: Found) -> None:
    """Of each layer the share of channels that 5 to 95 % of the test images keep, and the sets of a batch of 64."""
    gates = gates_of(network)
    assert gates is not None
    kept: dict[str, list[Tensor]] = {layer.name: [] for layer in gates.layers}
    ends = {layer.end: layer.name for layer in gates.layers}

    def hook(name: str) -> Any:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            kept[name].append(output.flatten(2).abs().amax(2) > 0)

        return note

    handles = [network.get_submodule(end).register_forward_hook(hook(name)) for end, name in ends.items()]
    answers(network, images[:2000])
    for handle in handles:
        handle.remove()
    for name, some in kept.items():
        masks = torch.cat(some)
        used = masks.float().mean(0)
        sets = statistics.mean(len(batch.unique(dim=0)) for batch in masks.split(64))
        varying = 100 * float(((used > 0.05) & (used < 0.95)).float().mean())
        found.add(CHOICE, name, varying=varying, sets_in_a_batch_of_64=math.floor(sets))


if __name__ == "__main__":
    main()
