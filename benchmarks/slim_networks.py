"""One network at any width: is it the network that was cut to this width, and as fast?

zoo       every network of the tests, at widths 0.25, 0.5 and 0.75 in double precision: the largest difference of the
          switched and the extracted network from a copy that `cut` made, over outputs and gradients; the largest
          difference of sorted from unsorted channels; the share of multiply-accumulates that can shrink, and of
          numbers that a width copies, because no view has them
latency   seconds of the switched (kept), deployed (contiguous), refreshed (as in training) and extracted network,
          divided by those of the cut copy, in float32 with one thread; and the copy's milliseconds. In turns;
          a tenth of the rounds were faster, which a busy machine disturbs least.

python benchmarks/slim_networks.py zoo
python benchmarks/slim_networks.py latency --clock cpu --only ResNet-20 resnet18
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.baselines.networks import ResNet20
from lightning_compress.channels.find import channel_groups
from lightning_compress.core.example_inputs import call
from lightning_compress.slimmable.network import SlimmableNetwork, extract
from lightning_compress.slimmable.norms import give_norms
from lightning_compress.slimmable.order import sort_channels
from lightning_compress.slimmable.switch import set_width, thin_of
from lightning_compress.slimmable.thin import ThinNetwork
from lightning_compress.slimmable.widths import counts_at, shrinkable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.reference import randomize, to_double
from support.reference import run as run_in_double
from support.widths import cut_copy, largest_difference, thin_differences
from support.zoo import ZOO, pretrained

WIDTHS = (0.25, 0.5, 0.75)
EQUAL = 1e-12


def compared(name: str) -> dict[str, float]:
    """The row of one network of the zoo."""
    torch.manual_seed(0)
    network = randomize(ZOO[name].make(), seed=1).double().eval()
    inputs = to_double(ZOO[name].inputs())
    groups = channel_groups(network, inputs)
    row = {"switched": 0.0, "extracted": 0.0, "gathered": 0.0}
    for width in WIDTHS:
        counts = counts_at(groups, width, allow_inexact=True)
        for training in (True, False):
            network.train(training)
            thin = ThinNetwork(network, groups, counts)
            row["switched"] = max(row["switched"], thin_differences(network, groups, counts, inputs, thin))
        row["gathered"] = max(row["gathered"], thin.gathered())
        reference = cut_copy(network, groups, counts, inputs)
        other = copy.deepcopy(network)
        give_norms(other, groups, WIDTHS, allow_inexact=True)
        found = [_outputs(one, inputs) for one in (extract(other, width, inputs), reference)]
        row["extracted"] = max(row["extracted"], largest_difference(*found))
    row["shrinks"] = shrinkable(network, groups, inputs, allow_inexact=True).share
    row["shrinks exactly"] = shrinkable(network, groups, inputs).share
    before = _flat(run_in_double(network, inputs))
    row["unsorted groups"] = float(len(sort_channels(network, groups, inputs, _reversed, allow_inexact=True)))
    row["sorted"] = largest_difference(_flat(run_in_double(network, inputs)), before)
    return row


def _reversed(network: nn.Module, groups: Any) -> dict[str, Tensor]:
    return {group.name: torch.arange(group.size) for group in groups}


def _flat(found: Any) -> list[Tensor]:
    found = found.to_tuple() if hasattr(found, "to_tuple") else found
    leaves = torch.utils._pytree.tree_leaves(found)
    return [one.detach() for one in leaves if isinstance(one, Tensor) and one.is_floating_point()]


def _outputs(network: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return _flat(call(network, inputs))


def zoo(only: list[str], console: Console) -> None:
    table = Table("network", box=box.MARKDOWN)
    for name in ("equal", "switched - cut", "extracted - cut", "sorted - unsorted"):
        table.add_column(name)
    for name in ("MACs that can shrink", "exactly", "numbers copied", "unsorted groups"):
        table.add_column(name, justify="right")
    equal = 0
    names = only or list(ZOO)
    for name in names:
        row = compared(name)
        fine = max(row["switched"], row["extracted"], row["sorted"]) < EQUAL and math.isfinite(row["switched"])
        equal += fine
        table.add_row(
            *(name, "yes" if fine else "NO", f"{row['switched']:.0e}", f"{row['extracted']:.0e}"),
            *(f"{row['sorted']:.0e}", f"{row['shrinks']:.0%}", f"{row['shrinks exactly']:.0%}"),
            *(f"{row['gathered']:.0%}", f"{row['unsorted groups']:.0f}"),
        )
    console.print(table)
    console.print(f"{equal} of {len(names)} are equal to {EQUAL:.0e} at widths {', '.join(map(str, WIDTHS))}.")


def _images(size: int, batch: int) -> Any:
    return torch.randn(batch, 3, size, size)


def _tokens(vocabulary: int, length: int, batch: int) -> Any:
    return {"input_ids": torch.randint(0, vocabulary, (batch, length))}


def networks() -> dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]]:
    """Networks of a usual size, with inputs for a batch."""
    transformer = {"vocab_size": 1000, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 64}
    found: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
        "ResNet-20": (partial(ResNet20, in_channels=3, num_classes=10), partial(_images, 32)),
        "GPT-2, 4 layers of 256": (
            pretrained("GPT2LMHeadModel", **transformer, use_cache=False),
            partial(_tokens, 1000, 32),
        ),
    }
    try:
        import torchvision
    except ImportError:
        return found
    for name in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "densenet121", "vit_b_16"):
        found[name] = partial(torchvision.models.get_model, name, weights=None), partial(_images, 224)
    return found


def timed(ways: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of a forward pass of each way, in turns: a tenth of the rounds were faster."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2):
        for way in ways.values():
            way()
    start = time.perf_counter()
    for way in ways.values():
        way()
    repeats = max(1, int(0.02 * len(ways) / max(time.perf_counter() - start, 1e-6)))  # tiny passes go in blocks
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(ways), len(ways)):
            before = clock()
            for _ in range(repeats):
                ways[name]()
            seconds[name].append((clock() - before) / repeats)
    return {name: sorted(found)[(len(found) - 1) // 10] for name, found in seconds.items()}


def latency(only: list[str], batches: list[int], rounds: int, clock: Callable[[], float], console: Console) -> None:
    table = Table("network", "width", "batch", box=box.MARKDOWN)
    for name in (
        *("cut, ms", "switched / cut", "deployed / cut", "refreshed / cut"),
        *("extracted / cut", "full / cut", "numbers copied"),
    ):
        table.add_column(name, justify="right")
    for name, (make, inputs_of) in networks().items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        network, example = make().eval(), inputs_of(2)
        groups = channel_groups(network, example)
        inexact = not groups.free()
        give_norms(network, groups, (0.25, 0.5), allow_inexact=inexact)
        full, deployed = copy.deepcopy(network), SlimmableNetwork(network)
        for width in (0.25, 0.5):
            counts = counts_at(groups, width, allow_inexact=inexact)
            plain = copy.deepcopy(network)
            del plain.width_norms
            native = cut_copy(plain, groups, counts, example)
            alone = extract(network, width, example)
            set_width(network, width)
            thin = thin_of(network, width)
            anew = copy.deepcopy(network)

            def refreshed(inputs: Any, anew: nn.Module = anew, width: float = width) -> Any:
                thin_of(anew, width).refresh(gradients=True)
                return call(anew, inputs)

            for batch in batches:
                inputs = inputs_of(batch)
                ways = {
                    "cut": partial(call, native, inputs),
                    "switched": partial(call, network, inputs),
                    "deployed": partial(call, partial(deployed, width=width), inputs),
                    "refreshed": partial(refreshed, inputs),
                    "extracted": partial(call, alone, inputs),
                    "full": partial(call, full, inputs),
                }
                with torch.no_grad():
                    found = timed(ways, rounds, clock)
                ratios = (f"{found[way] / found['cut']:.2f}" for way in ways if way != "cut")
                table.add_row(
                    name, f"{width:g}", f"{batch}", f"{1000 * found['cut']:.2f}", *ratios, f"{thin.gathered():.0%}"
                )
            set_width(network, 1.0)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["zoo", "latency"])
    parser.add_argument("--only", nargs="*", default=[], help="names of networks")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that does other things"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console = Console(width=200)
    if options.table == "zoo":
        zoo(options.only, console)
    else:
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        latency(options.only, options.batches, options.rounds, clock, console)


if __name__ == "__main__":
    main()
