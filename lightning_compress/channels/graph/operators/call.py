"""An operator in the graph, and the table of rules by which operators propagate labels.

An operator without a rule freezes what it touches: a wrong guess is a silently wrong network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_compress.channels.graph.units import Layer, Units, Value


class Average(NamedTuple):
    """An operator that averages over channels: `argument` holds them along `dim`, as `nodes` say."""

    argument: str
    dim: int
    nodes: Tensor
    zero: bool  # the reference sets dropped channels to zero before the operator, instead of leaving them out
    axis_order: int


class Call:
    """One operator in the graph: its arguments by name, and the module whose forward calls it."""

    def __init__(self, name: str, arguments: dict[str, Any], shape: Any, module: str, units: Units, axis_order: int):
        self.name, self.arguments, self.shape, self.module = name, arguments, shape, module
        self.units, self.axis_order = units, axis_order
        self.averages: list[Average] = []
        self.operate: Callable[..., Any] | None = None

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.name} in {self.module!r}" if self.module else self.name

    def freeze(self, layers: Sequence[Layer], why: str) -> None:
        """Freeze the channels that the layers label."""
        for layer in layers:
            self.units.freeze(layer.nodes, why)

    def inexact(self, argument: str, dim: int, layers: Sequence[Layer], why: str, *, zero: bool = False) -> None:
        """Note that the operator depends on how many channels there are."""
        for layer in layers:
            self.units.mark_inexact(layer.nodes, why)
            self.averages.append(Average(argument, dim, layer.nodes, zero, self.axis_order))


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for some operators."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
        return function

    return register


def run_rule(call: Call) -> Any:
    """Return the value, or values, of an operator's output."""
    known = RULES.get(call.name)
    if known is None:
        return unknown(call, f"the operator {call.where} is unknown to the planner")
    try:
        result = known(call)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        # A rule that meets arguments it was not written for: like an operator without a rule, and said aloud.
        return unknown(call, f"the planner does not understand {call.where}: {type(error).__name__}: {error}")
    if not _fits(result, call.shape):
        return unknown(call, f"the planner does not understand {call.where}, which returns something else here")
    return result


def _fits(result: Any, shape: Any) -> bool:
    """Whether a rule's result has the structure of the operator's: overloads of one name may return one or several."""
    if isinstance(shape, torch.Size):
        return isinstance(result, Value) and len(result.shape) == len(shape)
    if isinstance(shape, list):
        return isinstance(result, list) and len(result) == len(shape) and all(map(_fits, result, shape))
    return not isinstance(result, Value | list)


def unknown(call: Call, why: str) -> Any:
    """Freeze every channel that the operator touches."""
    for value in values_in(call.arguments):
        call.freeze(value.layers, why)
    return blank(call.shape)


def blank(shape: Any) -> Any:
    """Values without channels, in the structure of an operator's output."""
    if isinstance(shape, torch.Size):
        return Value(tuple(shape))
    return [blank(one) for one in shape] if isinstance(shape, list) else None


def values_in(tree: Any) -> list[Value]:
    """The values among nested arguments, in order."""
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [value for part in tree for value in values_in(part)] if isinstance(tree, list | tuple) else []
