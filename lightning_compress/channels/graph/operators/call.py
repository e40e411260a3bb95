"""An operator in the graph, and the table of rules by which operators propagate labels.

An operator without a rule freezes all channels that it touches, because a wrong guess makes a silently wrong network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_compress.channels.graph.units import Layer, Units, Value


class Average(NamedTuple):
    """Channels that an operator averages over.

    Attributes:
        argument: Name of the operator's argument; "tensors.1" is the second tensor of a list.
        dim: The argument's dimension along which the channels lie.
        nodes: The nodes along this dimension.
        zero: Whether the reference sets channels that leave to zero before the operator, instead of leaving them out.
        axis_order: Axis order of the nodes.
    """

    argument: str
    dim: int
    nodes: Tensor
    zero: bool
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
        """Name of the operator, and of the module that calls it, for messages."""
        return f"{self.name} in {self.module!r}" if self.module else self.name

    def freeze(self, layers: Sequence[Layer], why: str) -> None:
        """Freeze the channels that the layers label."""
        for layer in layers:
            self.units.freeze(layer.nodes, why)

    def inexact(self, argument: str, dim: int, layers: Sequence[Layer], why: str, *, zero: bool = False) -> None:
        """Record that the operator's result depends on the number of channels."""
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
    """Return the labelled output of an operator."""
    known = RULES.get(call.name)
    if known is None:
        return unknown(call, f"the operator {call.where} is unknown to the planner")
    try:
        result = known(call)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        # The rule was not written for these arguments. The reason of the frozen groups says so.
        return unknown(call, f"the planner does not understand {call.where}: {type(error).__name__}: {error}")
    if not _fits(result, call.shape):
        return unknown(call, f"the planner does not understand {call.where}, which returns something else here")
    return result


def _fits(result: Any, shape: Any) -> bool:
    """Return whether a rule's result has the structure of the operator's output, which may differ between overloads."""
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
    """Return values without labels, in the structure of an operator's output."""
    if isinstance(shape, torch.Size):
        return Value(tuple(shape))
    return [blank(one) for one in shape] if isinstance(shape, list) else None


def values_in(tree: Any) -> list[Value]:
    """Return the values among nested arguments, in order."""
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [value for part in tree for value in values_in(part)] if isinstance(tree, list | tuple) else []
