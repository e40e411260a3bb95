"""Replace the layers of a network by layers of low rank, in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call
from lightning_compress.core.numbers_by_pattern import numbers_by_name
from lightning_compress.core.select import exact_patterns, select_parameters
from lightning_compress.low_rank.choose import Choice, Chooser
from lightning_compress.low_rank.costs import Cost
from lightning_compress.low_rank.forms import FORMS
from lightning_compress.low_rank.packed import PackedSite
from lightning_compress.low_rank.ranks import DENSE
from lightning_compress.low_rank.record import LowRankStructure
from lightning_compress.low_rank.sites import Method, Seen, Site
from lightning_compress.low_rank.splits import Moments
from lightning_compress.low_rank.tied import TiedSite
from lightning_compress.low_rank.wanted import Wanted
from lightning_compress.measure.footprint import accelerators_of, seconds_in_turns, summarize_latency
from lightning_compress.measure.macs import count_macs
from lightning_compress.replacement.find import FoundLayers, Layer, find_layers, plainly
from lightning_compress.replacement.plan import Plan, Replacement, carry_out, dense_copy, grouped
from lightning_compress.replacement.statistics import InputStatistics, gather_statistics
from lightning_compress.replacement.swap import replaced

KIND = LowRankStructure.kind
Patterns = str | Sequence[str]
Clock = Callable[[], float]
_REPEATS = 9


@dataclass(frozen=True)
class LowRankReport:
    """What was replaced, and what was not, and why.

    Attributes:
        choices: What was decided of every layer that may be replaced, by path; of an embedding with the output matrix
            of its weight, by the path of the embedding.
        refused: Why the other layers may not be replaced, by path.
    """

    choices: Mapping[str, Choice]
    refused: Mapping[str, str]

    @property
    def replaced(self) -> dict[str, Choice]:
        """The layers that were replaced."""
        return {path: one for path, one in self.choices.items() if one.option.form != DENSE}

    @property
    def left(self) -> dict[str, str]:
        """Why the other layers are as they were, by path."""
        stay = {path: one.why for path, one in self.choices.items() if one.option.form == DENSE}
        return stay | dict(self.refused)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return a row of words for each layer: its path, form and rank, parameters before and after, and why not."""
        found = []
        for path, one in self.choices.items():
            names = FORMS[one.option.form].names if one.option.form != DENSE else ()
            ranks = ", ".join(f"{name} {n}" for name, n in zip(names, one.option.numbers, strict=True))
            size = f"{one.before.parameters:,} -> {one.after.parameters:,}" if ranks else f"{one.before.parameters:,}"
            found.append((path, f"{one.option.form}, {ranks}" if ranks else "as it is", size, one.why))
        return [*found, *((path, "as it is", "", why) for path, why in self.refused.items())]


def lower_rank(
    network: nn.Module,
    example_inputs: ExampleInputs,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    budget: float | None = None,
    cost: Cost = "parameters",
    method: Method = "auto",
    batches: Iterable[ExampleInputs] | None = None,
    target: Patterns | None = None,
    exclude: Patterns = (),
    clock: Clock = time.perf_counter,
) -> LowRankReport:
    """Replace layers of a network by products of thin ones, in place, where that makes the network cheaper.

    A linear layer of rank r becomes two, to r features and from them to the outputs; an embedding likewise. A
    convolution becomes the cheapest for what it loses of three splits: its kernel to r channels and a 1 x 1 convolution
    (channel), a vertical and a horizontal one (spatial), or 1 x 1, its kernel between fewer channels, and 1 x 1
    (tucker). With `batches` the factors are those that change the outputs least on these inputs. Parameters are new:
    make an optimizer afterwards.

    Args:
        network: The network, changed in place; modules keep their identity, names and hooks.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first.
        rank: The rank of every layer, or {pattern: rank}; of Tucker splits both ranks.
        energy: Instead: the share of the variance of each layer's outputs that stays.
        budget: Instead: the share of the network's cost that stays, spent over all layers by one water level. Where
            none of the three is given, half. Layers that were replaced before count as what they were in the whole.
        cost: "parameters"; "macs": multiply-accumulates; "latency": seconds, measured on this machine.
        method: "auto", or the only split that convolutions with a kernel may take.
        batches: What the network is called with, for the statistics of what layers read; None: plain SVD.
        target: Names of layers, or glob patterns; by default all.
        exclude: Names of layers that stay, or glob patterns.
        clock: Returns the time in seconds, for cost="latency".

    Returns:
        What was replaced, and what was not, and why.

    Raises:
        ValueError: An argument is out of range, no layer may be replaced, or the budget can't be met. The network is as
            it was.

    Example:
        >>> network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = lower_rank(network, torch.zeros(2, 64), rank=8)
        >>> report.rows()[0]
        ('0', 'linear, rank 8', '4,160 -> 1,088', '')
        >>> network[0].second
        Linear(in_features=8, out_features=64, bias=True)
    """
    wanted = Wanted(rank, energy, budget, cost, method)
    report, plan = plan_low_rank(
        network, example_inputs, wanted, batches=batches, target=target, exclude=exclude, clock=clock
    )
    undo = carry_out(network, plan, KIND)
    try:
        with plainly(network):
            call(network, example_inputs)
    except BaseException:
        undo()
        raise
    return report


def plan_low_rank(
    network: nn.Module,
    example_inputs: ExampleInputs,
    wanted: Wanted,
    *,
    batches: Iterable[ExampleInputs] | None = None,
    target: Patterns | None = None,
    exclude: Patterns = (),
    clock: Clock = time.perf_counter,
) -> tuple[LowRankReport, Plan]:
    """Return what `lower_rank` would do, as a report and as a plan, without doing it."""
    sites, ranks, refused = find_sites(network, example_inputs, wanted, batches=batches, target=target, exclude=exclude)
    chooser = Chooser(sites, wanted.cost, clock)
    if wanted.rank is not None:
        _check_ranks(sites, ranks)
        choices = chooser.by_rank(ranks)
    elif wanted.energy is not None:
        choices = chooser.by_energy(wanted.energy)
    else:
        assert wanted.budget is not None
        try:
            whole = total_cost(dense_copy(network), example_inputs, wanted.cost, clock)
            saved = whole - total_cost(network, example_inputs, wanted.cost, clock) if replaced(network) else 0.0
            choices = chooser.by_budget(wanted.budget, whole, saved)
        except ValueError as error:
            if not refused:
                raise
            raise ValueError(f"{error} Others may not: {_reasons(refused)}.") from error
    report = LowRankReport(choices, refused)
    return report, Plan(replacements_of(sites, choices), report.left)


def find_sites(
    network: nn.Module,
    example_inputs: ExampleInputs,
    wanted: Wanted,
    *,
    batches: Iterable[ExampleInputs] | None = None,
    target: Patterns | None = None,
    exclude: Patterns = (),
) -> tuple[dict[str, Site], dict[str, int], dict[str, str]]:
    """Return what may be replaced, by name, the rank that was given for each or 0, and why other layers may not be."""
    found = find_layers(network, example_inputs, tied=True)
    groups, refused = _groups(found)
    refused |= {
        f"{path}.in_proj_weight": "torch's MultiheadAttention reads it itself, without a layer that could be replaced"
        for path, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    }
    ranks = _wanted_by(network, wanted, groups, target, exclude, refused)
    paths = [path for name in ranks for path in groups[name]]
    reads = batches is not None and wanted.budget != 1
    statistics = gather_statistics(network, paths, batches) if reads and batches is not None else {}
    sites = {name: _site(name, groups[name], found, statistics, wanted.method) for name in ranks}
    return sites, ranks, refused


def replacements_of(sites: Mapping[str, Site], choices: Mapping[str, Choice]) -> dict[str, Replacement]:
    """Return what takes the place of every layer that a choice replaces, by its path."""
    return {
        path: Replacement(*one)
        for name, choice in choices.items()
        if choice.option.form != DENSE
        for path, one in sites[name].values(choice.option.form, choice.option.numbers).items()
    }


def _groups(found: FoundLayers) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the layers that are replaced together, by the first one's path, and why others are not."""
    groups: dict[str, tuple[str, ...]] = {}
    refused = dict(found.refused)
    for path, layer in found.layers.items():
        kinds = {other: found.layers[other].map.kind for other in (path, *layer.tied)}
        if len(kinds) == 1:
            groups[path] = (path,)
        elif sorted(kinds.values()) != ["embedding", "linear"]:
            refused[path] = (
                f"it shares its weight with {', '.join(layer.tied)}, which only an embedding and one output matrix may"
            )
        elif layer.map.kind == "embedding":
            groups[path] = (path, *layer.tied)
    return groups, refused


def _wanted_by(
    network: nn.Module,
    wanted: Wanted,
    groups: Mapping[str, Sequence[str]],
    target: Patterns | None,
    exclude: Patterns,
    refused: Mapping[str, str],
) -> dict[str, int]:
    """Return the rank of every group of layers that is wanted, 0 where no rank was given."""
    if not groups:
        reasons = f": {_reasons(refused)}" if refused else ""
        raise ValueError(f"{type(network).__name__} has no layer that low rank could replace{reasons}.")
    first_name = {id(parameter): name for name, parameter in network.named_parameters()}
    names = {path: first_name[id(network.get_submodule(path)._parameters["weight"])] for path in groups}
    default = exact_patterns(names.values())
    if isinstance(wanted.rank, Mapping):
        numbers = numbers_by_name(
            network,
            wanted.rank,
            target=target,
            default=default,
            exclude=exclude,
            argument="rank",
            done="replaced",
            leaving="exclude=",
        )
    else:
        chosen = select_parameters(network, default if target is None else target, exclude=exclude)
        numbers = dict.fromkeys(chosen, wanted.rank or 0)
    found = {path: numbers[name] for path, name in names.items() if name in numbers}
    if not found:
        why = [f"; {path}: {why}" for path, why in refused.items() if f"{path}.weight".lstrip(".") in numbers]
        raise ValueError(
            f"target={target!r} with exclude={exclude!r} names no layer that low rank could replace{''.join(why[:3])}."
        )
    return found


def _reasons(refused: Mapping[str, str]) -> str:
    found = grouped(refused)
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} other reasons" if len(found) > 3 else "")


def _check_ranks(sites: Mapping[str, Site], ranks: Mapping[str, int]) -> None:
    """Raise a ValueError for a rank that none of the layers that it is for can have."""
    for rank in dict.fromkeys(ranks.values()):
        most = {
            name: max(max(FORMS[form].most(site.sizes)) for form in site.forms())
            for name, site in sites.items()
            if ranks[name] == rank and site.forms()
        }
        if most and rank > max(most.values()):
            name = max(most, key=lambda one: most[one])
            raise ValueError(f"rank must be from 1 to {most[name]} for {name or 'the network'}; got {rank}.")


def _site(
    name: str,
    group: Sequence[str],
    found: FoundLayers,
    statistics: Mapping[str, InputStatistics],
    method: Method,
) -> Site:
    seen = [(path, _seen(found.layers[path], statistics.get(path))) for path in group]
    if len(seen) == 2:
        return TiedSite(seen[0], seen[1])
    is_packed = FORMS["packed"].refused(found.layers[name].map.sizes) is None
    return (PackedSite if is_packed else Site)(name, seen[0][1], method)


def _seen(layer: Layer, statistics: InputStatistics | None) -> Seen:
    moments: Sequence[Moments] | Tensor | None = None
    if statistics is not None and layer.map.kind == "embedding":
        count = statistics.count  # every entry counts as read once more, so that none is worth nothing
        moments = (statistics.mean * count + 1) / (count + len(statistics.mean))
    elif statistics is not None:
        mean, covariance = statistics.mean, statistics.covariance
        if mean.dim() == 1:
            mean, covariance = mean[None], covariance[None]
        moments = [_with_one_more(statistics.count, *one) for one in zip(mean, covariance, strict=True)]
    return Seen(layer, moments)


def _with_one_more(count: int, mean: Tensor, covariance: Tensor) -> Moments:
    """Return the moments with one row more, as large as the others and of any direction.

    So no direction is worth nothing because too few rows were seen, and a budget is spent on the others.
    """
    energy = (covariance.trace() + mean.square().sum()) / len(mean)
    return Moments(mean, (count * covariance + energy * torch.eye(len(mean)).to(covariance)) / (count + 1))


def total_cost(network: nn.Module, example_inputs: ExampleInputs, cost: Cost, clock: Clock) -> float:
    """Return what the whole network costs, for the batch of example inputs."""
    if cost == "parameters":
        return sum(parameter.numel() for parameter in network.parameters())
    with plainly(network), torch.no_grad():
        if cost == "macs":
            return count_macs(network, example_inputs)[0] * batch_size(example_inputs)
        run = {DENSE: lambda: call(network, example_inputs)}
        devices = accelerators_of(network, example_inputs)
        return summarize_latency(seconds_in_turns(run, devices, repeats=_REPEATS, clock=clock))[DENSE].seconds
