"""Networks cut at exits: right for every sample, at blocks and inside blocks, and as fast as their share of the work?

`zoo`: every network of the tests' zoo, with random weights in double precision, two exits at the ends of blocks (layers
where one tensor crosses the cut) and two inside blocks (where more do). A random part of 16 samples leaves at each
exit. The largest difference to the eager network and its heads, sample by sample, over the largest entry.

`clock`: networks in single precision, exits placed at 25, 50 and 75 % of the multiply-accumulates. Of 64 samples about
30 % leave at each exit, others at each call. "time / share": against the share of the multiply-accumulates that are
executed, times the eager time; early layers take more time than their share of these. "time / static": against what the
static networks of the exits (and the eager one) would take for those who left there, which counts gathering, waiting,
heads before the last one, and kernels that are made for a new number of samples. Then nobody leaves: with every exit
closed, and with heads that run but are never sure. Medians over rounds in which all take turns.

    PYTHONPATH=tests python benchmarks/exit_splits.py zoo
    python benchmarks/exit_splits.py clock --only resnet20 resnet18
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.baselines.networks import ResNet20
from lightning_compress.core.example_inputs import call
from lightning_compress.core.outputs import select_output
from lightning_compress.early_exit import Candidate, EarlyExitNetwork, ExitRule, exit_candidates, place_exits

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CLAIM = 1e-6
SAMPLES = 16
PIXELS = {"resnet20": 32, "vit_b_16": 224}


class Head(nn.Module):
    """A linear layer behind the mean over all but samples and features, which fits every tensor and output."""

    def __init__(self, shape: tuple[int, ...], answer: tuple[int, ...], features: int) -> None:
        super().__init__()
        self.features, self.answer = features, answer
        self.fc = nn.Linear(shape[features - 1], math.prod(answer))

    def forward(self, x: Tensor) -> Tensor:
        rest = [dim for dim in range(1, x.dim()) if dim != self.features]
        return self.fc(x.mean(rest) if rest else x).reshape(-1, *self.answer)


class Sure:
    """A score that is no more than a random number for each sample."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __call__(self, output: Tensor) -> Tensor:
        return torch.rand(output.shape[0], generator=self.generator).to(output.device)


def samples(inputs: Any, number: int) -> Any:
    """Different samples like those of an example, in its structure."""
    if isinstance(inputs, dict):
        return {name: samples(one, number) for name, one in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(samples(one, number) for one in inputs)
    generator = torch.Generator().manual_seed(3)
    if inputs.is_floating_point():
        return torch.randn(number, *inputs.shape[1:], dtype=inputs.dtype, generator=generator)
    found = torch.randint(1, int(inputs.max()) + 1, (number, *inputs.shape[1:]), generator=generator)
    if int(inputs.max()) == 1:  # a mask: some last tokens are not there
        found = (torch.arange(inputs.shape[1]) < torch.randint(3, 7, (number, 1), generator=generator)).long()
    return found


def part(inputs: Any, i: int) -> Any:
    if isinstance(inputs, dict):
        return {name: one[i : i + 1] for name, one in inputs.items()}
    return tuple(one[i : i + 1] for one in inputs) if isinstance(inputs, tuple) else inputs[i : i + 1]


def answers(network: nn.Module, heads: dict[str, nn.Module], inputs: Any, output: Any) -> list[Tensor]:
    """The answers at all exits and of the eager network."""
    found: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: found.update({name: out.clone()})
        )
        for name in heads
    ]
    last = select_output(call(network, inputs), output, "network")
    for handle in handles:
        handle.remove()
    return [*(head(found[name]) for name, head in heads.items()), last]


def worst(network: nn.Module, exits: list[Candidate], example: Any, output: Any) -> tuple[EarlyExitNetwork, float]:
    """The network with exits, and the largest relative difference to samples one by one."""
    inputs = samples(example, SAMPLES)
    answer = select_output(call(network, example), output, "network")
    heads: dict[str, nn.Module] = {
        one.name: Head(one.shape, tuple(answer.shape[1:]), 1 if len(one.shape) > 2 else len(one.shape)).double()
        for one in exits
    }
    sure = Sure()
    rule = ExitRule(rule="custom", thresholds=(0.6,) * len(exits), temperatures=(1.0,) * (len(exits) + 1))
    early = EarlyExitNetwork(network, heads, rule, example, output=output, confidence=sure).eval()
    sure.generator.manual_seed(4)
    got, index = (
        early(**inputs) if isinstance(inputs, dict) else early(*(inputs if type(inputs) is tuple else (inputs,)))
    )
    assert len(index.unique()) > 1
    difference = 0.0
    for i, k in enumerate(index.tolist()):
        expected = answers(network, heads, part(inputs, i), output)[k]
        difference = max(difference, float((got[i : i + 1] - expected).abs().max() / expected.abs().max()))
    return early, difference


def zoo(options: argparse.Namespace, console: Console) -> None:
    from support.reference import randomize, to_double
    from support.zoo import ZOO

    table = Table(title=f"The zoo, {SAMPLES} samples, float64, torch {torch.__version__}")
    for column in ("network", "at", "exits", "tensors that cross", "how", "difference", "seconds"):
        table.add_column(column, overflow="fold")
    counts: dict[str, dict[str, int]] = {"blocks": {}, "inside": {}}
    wrong, tried, split = 0, set(), set()
    for name in options.only or ZOO:
        torch.manual_seed(0)
        network = randomize(ZOO[name].make(), seed=1).double().eval()
        example = to_double(ZOO[name].inputs())
        with torch.no_grad():
            found = call(network, example)
        output = None if isinstance(found, Tensor) or hasattr(found, "logits") else next(iter(found))
        start = time.process_time()
        candidates = exit_candidates(network, example, output=output)
        if not candidates:
            console.print(f"{name}: no layer that an exit can follow")
        for where, some in {
            "blocks": [one for one in candidates if one.tensors == 1],
            "inside": [one for one in candidates if one.tensors != 1],
        }.items():
            exits = [some[i] for i in sorted({len(some) // 3, 2 * len(some) // 3})] if some else []
            if not exits:
                continue
            try:
                with torch.no_grad():
                    early, difference = worst(network, exits, example, output)
                how = "whole batches" if early.whole_batch else "split"
            except Exception as error:  # its row says so, and the other networks go on
                how, difference = f"{type(error).__name__}: {error}"[:80], math.inf
            tried.add(name)
            split |= {name} if how == "split" else set()
            wrong += how in ("split", "whole batches") and difference > CLAIM
            counts[where][how] = counts[where].get(how, 0) + 1
            crossing = ", ".join(str(one.tensors) for one in exits)
            seconds = f"{time.process_time() - start:.1f}"
            table.add_row(
                name, where, ", ".join(one.name for one in exits), crossing, how, f"{difference:.0e}", seconds
            )
            print(name, where, how, f"{difference:.0e}", flush=True)
            start = time.process_time()
    console.print(table)
    console.print(f"{len(split)} networks split somewhere; {len(tried)} have a layer that an exit can follow.")
    for where, found in counts.items():
        console.print(f"{where}: {', '.join(f'{count} {how}' for how, count in found.items())}")
    console.print(f"{wrong} of them differ by more than {CLAIM:.0e}.")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet20":
        return ResNet20(width=16).eval()
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval()


def rounds(calls: dict[str, Callable[[], Any]], number: int, clock: Callable[[], float]) -> dict[str, float]:
    """The median seconds of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(number + 1):  # the first warms up
        for name, one in calls.items():
            start = clock()
            one()
            if i:
                times[name].append(clock() - start)
    return {name: statistics.median(some) for name, some in times.items()}


def clock(options: argparse.Namespace, console: Console) -> None:
    timer = time.process_time if options.processor else time.perf_counter
    table = Table(
        *("network", "samples", "eager ms", "share of MACs", "time", "time / share", "time / static"),
        *("all closed", "nobody sure"),
        title=f"Time over that of the eager network, torch {torch.__version__}, {options.threads} threads, "
        f"{'processor time, ' if options.processor else ''}medians of {options.rounds}",
    )
    for name in options.only or ("resnet20", "resnet18", "mobilenet_v3_small", "densenet121"):
        network = make(name)
        pixels = PIXELS.get(name, 64)
        example = torch.randn(2, 3, pixels, pixels)
        exits = place_exits(network, example)
        known = {one.name: one for one in exit_candidates(network, example)}
        shares = [known[one].share for one in exits]
        with torch.no_grad():
            answer = network(example)
        shapes = [known[one].shape for one in exits]
        heads = {
            one: Head(shape, tuple(answer.shape[1:]), 1 if len(shape) > 2 else len(shape)).eval()
            for one, shape in zip(exits, shapes, strict=True)
        }
        made = {}
        for what, threshold in {"leaving": 0.7, "closed": math.inf, "unsure": 2.0}.items():
            kind: Any = "custom" if what == "leaving" else "confidence"
            rule = ExitRule(rule=kind, thresholds=(threshold,) * len(exits), temperatures=(1.0,) * (len(exits) + 1))
            made[what] = EarlyExitNetwork(
                network,
                heads,
                rule,
                example,
                confidence=Sure() if what == "leaving" else None,
                compile=options.compile,
            ).eval()
        for number in options.samples:
            inputs = torch.randn(number, 3, pixels, pixels)
            left: list[Tensor] = []

            def leaving(inputs: Tensor = inputs, left: list[Tensor] = left, early: Any = made["leaving"]) -> None:
                left.append(early(inputs)[1])

            calls: dict[str, Callable[[], Any]] = {
                "eager": lambda network=network, inputs=inputs: network(inputs),
                "leaving": leaving,
                "closed": lambda made=made, inputs=inputs: made["closed"](inputs),
                "unsure": lambda made=made, inputs=inputs: made["unsure"](inputs),
            }
            for k in range(1, len(exits) + 1):
                calls[f"exit {k}"] = lambda made=made, inputs=inputs, k=k: made["closed"](inputs, exit=k)
            with torch.no_grad():
                for _ in range(options.warm):
                    leaving()
                left.clear()
                times = {key: 1e3 * one for key, one in rounds(calls, options.rounds, timer).items()}
            index = torch.cat(left[1:])
            macs = float(torch.tensor([*shares, 1.0])[index].mean())
            by_clock = [*(times[f"exit {k}"] for k in range(1, len(exits) + 1)), times["eager"]]
            ideal = float(torch.tensor(by_clock)[index].mean())
            row = [
                name,
                str(number),
                f"{times['eager']:.2f}",
                f"{macs:.2f}",
                f"{times['leaving'] / times['eager']:.2f}",
            ]
            row += [f"{times['leaving'] / times['eager'] / macs:.2f}", f"{times['leaving'] / ideal:.2f}"]
            row += [f"{times[key] / times['eager']:.2f}" for key in ("closed", "unsure")]
            print(*row, flush=True)
            table.add_row(*row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("zoo", "clock"))
    parser.add_argument("--only", nargs="*", help="names of networks; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--warm", type=int, default=30, help="calls before, as new numbers of samples need new kernels")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 1])
    parser.add_argument(
        "--processor", action="store_true", help="the processor's seconds, on a machine with other work"
    )
    parser.add_argument("--compile", action="store_true", help="compile the stages")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    console = Console(width=160)
    {"zoo": zoo, "clock": clock}[options.what](options, console)


if __name__ == "__main__":
    main()
