"""A plan of what replaces which layers of a network, and its execution: all of it, or none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.evaluation import renew_caches
from lightning_compress.replacement.layer import linear_map
from lightning_compress.replacement.record import note_replaced
from lightning_compress.replacement.swap import Replaced, replaced, restore, size_of, swap


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a layer: see `swap`.

    Attributes:
        form: The class that the layer takes.
        numbers: The form's numbers.
        values: The tensors of its parts by name; None: torch's initialisation.
    """

    form: type[Replaced]
    numbers: Mapping[str, Any]
    values: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Plan:
    """What replaces layers of a network.

    Attributes:
        replacements: By path of the layer.
        kept: By path of another layer, the reason why it stays.
    """

    replacements: Mapping[str, Replacement]
    kept: Mapping[str, str] = field(default_factory=dict)

    def rows(self, network: nn.Module) -> list[list[str]]:
        """Return for each layer of a network its name, form, numbers, and parameters before and after, as words."""
        rows = []
        for path, one in self.replacements.items():
            of = linear_map(network.get_submodule(path)).sizes
            numbers = ", ".join(f"{name} {value}" for name, value in one.numbers.items())
            rows.append([path, one.form.form, numbers, f"{of.parameters:,}", f"{size_of(one.form, of, one.numbers):,}"])
        return rows + [[path, f"stays: {reason}", "", "", ""] for path, reason in self.kept.items()]


def carry_out(network: nn.Module, plan: Plan, kind: str) -> Callable[[], None]:
    """Replace layers of a network as a plan says, in place, and return a function that undoes it.

    Args:
        network: The network.
        plan: The plan.
        kind: Of the records in its state dicts: "low_rank" or "conv_block".

    Raises:
        ValueError: The plan does not fit the network, which is then as it was.
    """
    undo = ExitStack()
    with undo:
        for path, one in plan.replacements.items():
            layer = network.get_submodule(path)
            undo.callback(swap(layer, one.form, one.numbers, one.values))
            for handle in note_replaced(layer, kind):
                undo.callback(handle.remove)
        renew_caches(network)
        undo = undo.pop_all()
    torch.clear_autocast_cache()  # it holds weights that have left
    return undo.close


def grouped(reasons: Mapping[str, str]) -> list[str]:
    """Return reasons by path as words, each reason once, with the first paths that have it.

    Example:
        >>> grouped({"a": "it is frozen", "b": "it is tied", **{f"c.{n}": "it is frozen" for n in range(9)}})
        ['a, c.0, c.1 and 7 more: it is frozen', 'b: it is tied']
    """
    by_reason: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        by_reason.setdefault(reason, []).append(path or "the network")
    return [
        f"{', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}: {reason}"
        for reason, paths in by_reason.items()
    ]


def dense_copy(network: nn.Module) -> nn.Module:
    """Return a copy of a network in which replaced layers are what they were, with undefined values, to count costs.

    A layer of whose channels some have been cut since stays as it is.
    """
    if not replaced(network):
        return network
    copied = copy.deepcopy(network)
    for layer in replaced(copied).values():
        if layer.widths() == (layer.was.inputs, layer.was.outputs):
            restore(layer)
    return copied


def parameters_left(network: nn.Module) -> float:
    """Return the share of a network's parameters that is left after layers of it were replaced.

    Example:
        >>> parameters_left(nn.Linear(2, 2))
        1.0
    """
    now = sum(one.numel() for one in network.parameters())
    layers = replaced(network).values()
    inside = {id(one): one.numel() for layer in layers for one in layer.parameters()}
    were = {  # layers that had one weight together had it once
        id(one): one.numel()
        for layer in layers
        for one in layer._dense.entries["_parameters"].values()
        if one is not None
    }
    before = now - sum(inside.values()) + sum(were.values())
    return now / before if before else 1.0
