"""AutoSlim: find a width for every group of channels, within a budget, on weights that were trained at many widths."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import ChannelGroup, ChannelGroups
from lightning_compress.core.answering import answering_now
from lightning_compress.core.distributed import all_reduce_max, all_reduce_sum, rank
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs, call, first_samples, to_device
from lightning_compress.core.files import replacing
from lightning_compress.core.given import real_number, whole_number
from lightning_compress.core.outputs import select_output
from lightning_compress.core.recalibrate import recalibrate
from lightning_compress.measure.footprint import accelerators_of, seconds_in_turns, summarize_latency
from lightning_compress.measure.macs import count_macs
from lightning_compress.slimmable.found import Counts, Decision, FoundWidths, Unit
from lightning_compress.slimmable.norms import WidthNorms, sliced_norms
from lightning_compress.slimmable.thin import ThinNetwork
from lightning_compress.slimmable.widths import free_groups

Loss = Callable[[Tensor, Tensor], Tensor]

_CLOSE = 1e-3  # between the full network's losses before and after an interruption, in proportion


def search_widths(
    network: nn.Module,
    batches: Iterable[tuple[ExampleInputs, Tensor]],
    *,
    budget: float,
    unit: Unit = "share",
    step: float = 0.1,
    least: float = 0.1,
    loss: Loss | None = None,
    output: str | int | None = None,
    norms: Literal["recalibrate", "batch"] = "recalibrate",
    calibration: Iterable[ExampleInputs] | None = None,
    groups: ChannelGroups | None = None,
    allow_inexact: bool = False,
    record: str | Path | None = None,
    repeats: int = 10,
) -> FoundWidths:
    """Narrow one group of channels after another, each time the one that costs the least loss for what it saves.

        score(group) = (loss without some of its channels - loss now) / (cost now - cost without them)

    until the budget is met. A group loses its last channels: those after the first ones, in the order in which the
    network was trained at several widths, as by `SlimmableWidth(..., universal=True)`.

    On several ranks each has batches of its own, and all decide alike by the mean loss over all samples; milliseconds
    are those of the slowest rank.

    Args:
        network: The full network, which stays as it is.
        batches: Inputs and targets that the network was not trained on. They are kept in memory.
        budget: The largest cost.
        unit: Of the budget: "share" of the full network's multiply-accumulates, "macs" per sample, or "ms" for a batch
            such as the first one, measured now.
        step: The share of a group's channels that leave in one step.
        least: The share of its channels that each group keeps.
        loss: A function from the output and the targets of a batch to their mean loss; None: cross-entropy. A share of
            wrong answers does as well.
        output: Key, position or attribute of the output, where the network returns more than a tensor.
        norms: "recalibrate": the statistics of norms are computed anew for each candidate; "batch": norms use those of
            each batch, in half the time.
        calibration: The network's inputs for that; None: those of `batches`. Five of them are used.
        groups: As `channel_groups` returns them for the network; None: they are found from the first batch.
        allow_inexact: Whether groups get narrower that a norm or a softmax counts.
        record: A JSON file. Each step is written to it, and a search that finds its file goes on from there. A search
            for another budget may do so, too. It is refused if its settings or the full network's loss are others.
        repeats: The number of timed runs of each candidate, for "ms".

    Raises:
        ValueError: There is no batch, the budget can't be met, a number is out of range, no group may be cut, the
            network runs at another width than the full one, a loss is nan, or the record is that of another search or
            broken.

    Paper:
        Yu and Huang, AutoSlim (1903.11728), section 3.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 3), torch.randint(2, (16,)))]
        >>> found = search_widths(net, batches, budget=0.5, step=0.25)
        >>> found.decisions[-1].cost <= 0.5, list(found.widths())
        (True, ['0', '2'])
    """
    step = real_number(step, "step must be a share above 0, at most 1", above=0, most=1)
    least = real_number(least, "least must be a share, 0 or more and below 1", least=0, below=1)
    whole_number(repeats, "repeats must be a whole number, at least 1", least=1)
    if unit not in get_args(Unit) or norms not in ("recalibrate", "batch"):
        raise ValueError(f"unit is share, macs or ms, and norms recalibrate or batch; got {unit!r} and {norms!r}.")
    most, said = (1.0, "at most 1, the full network's share") if unit == "share" else (math.inf, "finite")
    budget = real_number(budget, f"budget must be above 0 and {said}, in the unit {unit!r}", above=0, most=most)
    path = None if record is None else Path(record)
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"The record can't be written to {path}, because {path.parent} is no folder: make it first.")
    if answering_now(network) is not network:
        raise ValueError(f"{type(network).__name__} runs at another width than the full one: set_width(1.0) first.")
    device = next((one.device for one in network.parameters()), torch.device("cpu"))
    held = [(to_device(inputs, device), targets.to(device)) for inputs, targets in batches]
    if not held:
        raise ValueError("There is no batch on which candidates could be compared.")
    groups = channel_groups(network, held[0][0]) if groups is None else groups
    search = _Search(
        network,
        groups,
        free_groups(groups, allow_inexact=allow_inexact),
        held,
        [inputs for inputs, _ in held] if calibration is None else list(calibration),
        loss or F.cross_entropy,
        output,
        norms,
        unit,
        step,
        least,
        repeats,
    )
    found = search.begin(path)
    lowest = search.costs([search.floor()])[0]
    while found.now.cost > budget:
        if budget < lowest or found.counts() == search.floor():  # milliseconds differ from one time to the other
            raise ValueError(
                f"The budget of {budget!r} {unit} can't be met: the narrowest network needs {lowest:.4g}, with "
                f"least={least:g} of the channels of each of {len(search.free)} groups."
            )
        found.decisions.append(search.step_from(found))
        if path is not None and rank() == 0:
            with replacing(path) as temporary:
                temporary.write_text(found.to_json())
    return found


@dataclass
class _Search:
    network: nn.Module
    groups: ChannelGroups
    free: Sequence[ChannelGroup]
    batches: list[tuple[ExampleInputs, Tensor]]
    calibration: list[ExampleInputs]
    loss: Loss
    output: str | int | None
    norms: str
    unit: Unit
    step: float
    least: float
    repeats: int

    def begin(self, record: Path | None) -> FoundWidths:
        """Return the search as far as a record has come."""
        sizes = {group.name: group.size for group in self.free}
        loss, cost = self.loss_of(sizes), self.costs([sizes])[0]
        start = FoundWidths(sizes, self.unit, self.step, loss, cost, self.least, self.norms)
        if record is not None and record.exists():
            try:
                found = FoundWidths.from_json(record.read_text())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{record} is no complete record of a search ({type(error).__name__}: {error}): remove it, and the "
                    f"search begins anew."
                ) from error
            self._check_start(record, found, start)
            return found
        return start

    def _check_start(self, record: Path, found: FoundWidths, start: FoundWidths) -> None:
        """Refuse the record of a search that began elsewhere; milliseconds differ from one time to the other."""
        names = ["unit", "step", "least", "norms", "sizes"] + ["cost"] * (self.unit != "ms")
        other = [name for name in names if getattr(found, name) != getattr(start, name)]
        if not math.isclose(found.loss, start.loss, rel_tol=_CLOSE, abs_tol=_CLOSE / 10):
            other.append("loss")
        if other:
            has = ", ".join(f"{name}={reprlib.repr(getattr(found, name))}" for name in other)
            here = ", ".join(f"{name}={reprlib.repr(getattr(start, name))}" for name in other)
            raise ValueError(
                f"{record} is the record of another search: it has {has}; this one has {here}. The loss and cost are "
                f"those of the full network on these batches: name another file, or remove this one."
            )

    def floor(self) -> Counts:
        return {group.name: self._fewest(group) for group in self.free}

    def step_from(self, found: FoundWidths) -> Decision:
        """Return the decision that follows those of before."""
        counts = found.counts()
        now = found.now
        fewer = {
            group.name: max(self._fewest(group), counts[group.name] - max(1, round(self.step * group.size)))
            for group in self.free
            if counts[group.name] > self._fewest(group)
        }
        candidates = [counts | {name: count} for name, count in fewer.items()]
        costs = self.costs([counts, *candidates])
        losses = [self.loss_of(one) for one in candidates]
        table = dict(zip(fewer, zip(losses, costs[1:], strict=True), strict=True))

        def score(name: str) -> tuple[float, float]:
            loss, saved = table[name][0], costs[0] - table[name][1]
            return (loss - now.loss) / saved if saved > 0 else float("inf"), loss

        best = min(fewer, key=score)
        return Decision(best, fewer[best], *table[best], table)

    def _fewest(self, group: ChannelGroup) -> int:
        return max(1, round(self.least * group.size))

    def costs(self, several: Sequence[Counts]) -> list[float]:
        """Return the cost of the networks with so many channels."""
        inputs = self.batches[0][0]
        if self.unit != "ms":
            one = first_samples(inputs, 1)
            with evaluating(self.network):
                full = count_macs(self.network, one)[0] if self.unit == "share" else 1
                return [count_macs(self._thin(counts), one)[0] / full for counts in several]
        with evaluating(self.network):
            calls = {str(i): partial(call, self._thin(counts), inputs) for i, counts in enumerate(several)}
            seconds = seconds_in_turns(
                calls, accelerators_of(self.network, inputs), repeats=self.repeats, clock=perf_counter
            )
        found = torch.tensor([1000 * one.seconds for one in summarize_latency(seconds).values()], dtype=torch.float64)
        return list(all_reduce_max(found).tolist())

    def loss_of(self, counts: Counts) -> float:
        """Return the mean loss of the network with so many channels over all samples of all ranks."""
        whole = all(counts[group.name] == group.size for group in self.free)
        with evaluating(self.network):
            module: Any = self.network if whole else self._thin(counts)
            if not whole and self.norms == "recalibrate":
                recalibrate(module, self.calibration)
            with evaluating(module):
                if not whole and self.norms == "batch":
                    for norm in module.modules():
                        if isinstance(norm, nn.modules.batchnorm._NormBase):
                            norm.training = True
                total, samples = 0.0, 0
                for inputs, targets in self.batches:
                    output = select_output(call(module, inputs), self.output, type(self.network).__name__)
                    total += float(self.loss(output, targets)) * len(targets)
                    samples += len(targets)
        sums = all_reduce_sum(torch.tensor([total, samples], dtype=torch.float64, device=self.batches[0][1].device))
        found = float(sums[0] / sums[1])
        if math.isnan(found):
            raise ValueError(
                f"The held-out loss of {type(self.network).__name__} is nan with the channels {counts}, so that no "
                f"candidates can be compared: look at its outputs and at loss=."
            )
        return found

    def _thin(self, counts: Counts) -> nn.Module:
        """Return a network with the first channels only, and statistics of its own."""
        norms = WidthNorms((1.0,), "recalibrate", {1.0: sliced_norms(self.network, self.groups, counts)})
        return ThinNetwork(self.network, self.groups, counts, norms.of(1.0)).module
