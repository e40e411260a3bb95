"""Several widths in one ResNet-20, beside networks that are trained alone at these widths: accuracy, time, bytes.

The slimmable network starts from the initial weights of the full one and trains for as many epochs as each network
alone. "falls": how far its accuracy is below that alone. With --universal a second one is trained for any width, and
tested at eight widths that training never drew, with the statistics of norms computed anew from five training batches,
and before that with those of the full network. A training step: the median over short fits in turns, against the sum of
those of the networks alone; memory: the peak of such a fit above what was resident before. Latency: a network that
switches and keeps its thin network, the one extracted at the width, and one built natively, in turns. Bytes: of
compressed files, of one network and of the set.

    python benchmarks/slimmable.py --dataset mnist --data data/mnist --weights weights
    python benchmarks/slimmable.py --dataset cifar10 --data data/cifar10 --weights weights --universal --norms private
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
    initial,
    parts,
    right,
    settings,
    step_seconds,
    times,
    trained,
    trainer,
)
from mnist_pruning import silence
from rich.console import Console
from torch import Tensor, nn

from lightning_compress import SlimmableWidth, save_compressed
from lightning_compress.baselines import Classifier, ResNet20, TensorLoader
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.measure.macs import count_macs
from lightning_compress.slimmable.norms import norms_of, sliced_norms
from lightning_compress.slimmable.switch import set_width
from lightning_compress.slimmable.widths import counts_at

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.resident import forget_peak, peak, resident

WIDTH = 16
UNSEEN = (0.27, 0.35, 0.42, 0.52, 0.61, 0.7, 0.83, 0.92)  # no multiples of 1/32, which training draws
EVERY = "Test accuracy by width"
ANY = "Widths that were never trained: test accuracy"
STEPS = "A training step"
TIMES = "Latency by width, as shares of the native network's"
BYTES = "Bytes of compressed files"


def resnet(setting: Setting, shape: Sequence[int], width: float = 1.0) -> Classifier:
    """A ResNet-20 from the seed's initial weights, built with that share of the channels."""
    make = partial(ResNet20, width=math.ceil(width * WIDTH), in_channels=shape[0])
    return classifier(initial(make, setting), setting, shape)


def slimmable(setting: Setting, shape: Sequence[int], **options: Any) -> SlimmableWidth:
    return SlimmableWidth(resnet(setting, shape), network="network", example_inputs=torch.zeros(2, *shape), **options)


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """How slimmable networks are trained, by the name of their weights."""
    found: dict[str, dict[str, Any]] = {}
    widths = "-".join(f"{width:g}" for width in arguments.widths)
    for norms, share, weights in product(arguments.norms, arguments.distill, arguments.loss_weights):
        options = {"widths": arguments.widths, "norms": norms, "distill": share, "weights": weights}
        named = "" if weights == "equal" else f"-{weights}"
        found[f"slim-{norms}-{share:g}{named}-{widths}"] = options
    if arguments.universal:
        found[f"universal-{widths}"] = {"widths": arguments.widths, "universal": True}
    return found


def accuracy(
    alone: Mapping[float, nn.Module], slim: Mapping[str, SlimmableWidth], test: TensorLoader, found: Found
) -> None:
    """The accuracy of every width, in one network and alone."""
    for width, network in alone.items():
        by_itself = right(answers(network, test.inputs), test.targets)
        found.add(EVERY, f"width {width:g}", alone=by_itself)
        for name, module in slim.items():
            reached = right(answers(partial(module.deploy(), width=width), test.inputs), test.targets)
            found.add(EVERY, f"width {width:g}", **{name: reached, f"{name} less alone": reached - by_itself})


def any_width(module: SlimmableWidth, data: ImageData, test: TensorLoader, found: Found) -> None:
    """The accuracy at widths that were never trained."""
    network: Any = module.network
    held = norms_of(network)
    assert held is not None
    assert held.groups is not None
    for width in UNSEEN:
        set_width(network, width, norms=sliced_norms(network, held.groups, counts_at(held.groups, width)))
        before = right(answers(network, test.inputs), test.targets)
        found.add(ANY, f"width {width:g}", with_statistics_of_the_full_network=before)
    set_width(network, 1.0)
    module.recalibrate(data.train_dataloader(), widths=UNSEEN)
    last, worst = 0.0, 0.0
    for width in UNSEEN:
        set_width(network, width)
        reached = right(answers(network, test.inputs), test.targets)
        worst, last = max(worst, last - reached), reached
        found.add(ANY, f"width {width:g}", recalibrated=reached)
    set_width(network, 1.0)
    found.add(ANY, "largest fall from one width to the next", recalibrated=worst)


def training_step(
    makers: Mapping[str, Callable[[], Any]],
    alone: Sequence[str],
    data: ImageData,
    setting: Setting,
    clock: Callable[[], float],
    found: Found,
) -> None:
    """Milliseconds of a step, against the sum of those of the networks alone, and memory."""
    seconds = step_seconds(makers, data, setting, clock)
    together = sum(seconds[name] for name in alone)
    for name, make in makers.items():
        module, before = make(), resident()
        forget_peak()
        trainer(setting, 1, limit_train_batches=4).fit(module, datamodule=data)
        found.add(STEPS, name, ms=1000 * seconds[name], by_the_sum_of_those_alone=seconds[name] / together)
        found.add(STEPS, name, peak_MiB=(peak() - before) / 2**20)


def timing(
    module: SlimmableWidth,
    alone: Mapping[float, nn.Module],
    test: TensorLoader,
    setting: Setting,
    clock: Callable[[], float],
    found: Found,
) -> None:
    """Times of a width: switched, extracted and native, in turns."""
    slim = module.deploy()
    order = torch.randperm(len(test.inputs), generator=torch.Generator().manual_seed(0))
    for size, count, rounds in ((64, 2, 1), (1, 10, 1)) if setting.quick else ((64, 30, 3), (1, 300, 3)):
        batches = test.inputs[order[: size * count]].split(size)
        for width, native in alone.items():
            ways: dict[str, Callable[[Tensor], Any]] = {
                "native": native,
                "extracted": module.extract(width).eval(),
                "switched": partial(slim, width=width),
            }
            seconds = {
                name: statistics.median(of_batches) for name, of_batches in times(ways, batches, rounds, clock).items()
            }
            found.add(TIMES, f"width {width:g}", **{f"native, ms at {size}": 1000 * seconds["native"]})
            for name in ("extracted", "switched"):
                found.add(TIMES, f"width {width:g}", **{f"{name} at {size}": seconds[name] / seconds["native"]})
    whole = count_macs(alone[1.0], test.inputs[:1])[0]
    for width, native in alone.items():
        found.add(TIMES, f"width {width:g}", MACs=count_macs(native, test.inputs[:1])[0] / whole)


def sizes(alone: Mapping[float, nn.Module], slim: Mapping[str, SlimmableWidth], found: Found) -> None:
    """Bytes of the files of networks alone, of all of them, and of those with all widths."""

    def size(network: nn.Module) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return save_compressed(network, Path(folder) / "network.lcz").bytes

    of_one = {width: size(network) for width, network in alone.items()}
    for width, number in of_one.items():
        found.add(BYTES, f"width {width:g} alone", KiB=number / 1024)
    found.add(BYTES, "these together", KiB=sum(of_one.values()) / 1024)
    for name, module in slim.items():
        network: Any = module.network
        number = size(network)
        found.add(BYTES, name, KiB=number / 1024, share_of_these_together=number / sum(of_one.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--norms", nargs="+", choices=["private", "statistics", "recalibrate"], default=["private"])
    parser.add_argument("--distill", type=float, nargs="+", default=[0.5], help="the full network's share of a loss")
    parser.add_argument(
        "--loss-weights", nargs="+", choices=["equal", "rising"], default=["equal"], help="of the widths' losses"
    )
    parser.add_argument("--universal", action="store_true", help="train one for any width as well")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    random.seed(0)
    console, found = Console(width=200), Found()
    for setting in settings(arguments):
        data = data_of(setting)
        data.setup()
        shape = data.input_shape
        make_alone = {width: partial(resnet, setting, shape, width) for width in arguments.widths}
        make_slim = {
            name: partial(slimmable, setting, shape, **options) for name, options in variants(arguments).items()
        }
        alone: dict[float, Any] = {}
        for width, make in make_alone.items():
            name = "plain" if width == 1.0 else f"width{math.ceil(width * WIDTH)}"
            module: Any = trained(name, make, data, setting)
            alone[width] = module.network
        slim: dict[str, Any] = {name: trained(name, make, data, setting) for name, make in make_slim.items()}
        if arguments.only == "train":
            continue
        _, test = parts(data, setting)
        if arguments.only != "time":
            accuracy(alone, slim, test, found)
            if arguments.universal:
                any_width(list(slim.values())[-1], data, test, found)
            sizes(alone, slim, found)
        if arguments.only != "accuracy" and setting.seed == arguments.seeds[0]:
            clock = clock_of(arguments)
            timing(next(iter(slim.values())), alone, test, setting, clock, found)
            named = {f"width {width:g} alone": make for width, make in make_alone.items()}
            training_step(named | make_slim, list(named), data, setting, clock, found)
    console.print(f"{arguments.dataset}: {setting.epochs} epochs, seeds {arguments.seeds}; times of the first seed")
    found.show(console, arguments.json)


if __name__ == "__main__":
    main()
