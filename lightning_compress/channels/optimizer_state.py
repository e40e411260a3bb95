"""Slice an optimizer's state like its parameter, where the meaning of every state tensor is known.

A state tensor is sliced if it holds plain floats and has the parameter's shape (or 1 in some dimensions), and if its
name is one of those of moments, or if tensors of its name have the shape of parameters of several sizes. A length alone
proves nothing: a table of 256 levels is as long as a layer with 256 rows, and a preconditioner as a square weight.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_MOMENTS = re.compile(
    r"momentum_buffer|(max_)?exp_avg\w*|exp_inf|square_avg|grad_avg|acc_delta|sum|prev|step_size|ax|variance"
    r"|(row|col)_var"
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)

_ADVICE = (
    "Use SGD, Adam, AdamW or Adafactor, or cut before the optimizer is made, or at the fit's end (shrink='on_fit_end')."
)

Select = Callable[[Tensor, Mapping[int, Tensor]], Tensor]


def slice_state(
    optimizer: Optimizer, parameter: nn.Parameter, dims: Mapping[int, Tensor], select: Select
) -> Callable[[], None]:
    """Slice the state that an optimizer, and those inside it, keep for a parameter; return a function that undoes it.

    Args:
        optimizer: The optimizer, or Lightning's wrapper of it.
        parameter: The parameter, which still has its old shape.
        dims: By dimension the positions that stay.
        select: Returns a tensor's entries at some positions.

    Raises:
        ValueError: A part of the state has no known meaning; nothing changes.
    """
    _check_groups(optimizer)
    changes = []
    for state in _states(optimizer, parameter):
        new = {}
        for name, value in state.items():
            where = _places(optimizer, parameter, name, value)
            if where:
                new[name] = select(value, {where[dim]: keep for dim, keep in dims.items() if dim in where})
        changes.append((state, dict(state), new))
    for state, _, new in changes:
        state.update(new)

    def undo() -> None:
        for state, old, _ in changes:
            state.clear()
            state.update(old)

    return undo


def check_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Raise a ValueError unless the optimizer's state of these parameters could be sliced, now and after steps.

    A twin of an optimizer that is not torch's own takes a step with copies of parameters, to show which state it keeps.
    """
    mine = {id(one) for level in _levels(optimizer) for group in level.param_groups for one in group["params"]}
    its = [one for one in parameters if id(one) in mine]
    _check(optimizer, its)
    if (twin := _after_a_step(optimizer, its)) is not None:
        _check(twin, [one for level in _levels(twin) for group in level.param_groups for one in group["params"]])


def _check(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    _check_groups(optimizer)
    for parameter in parameters:
        for state in _states(optimizer, parameter):
            for name, value in state.items():
                _places(optimizer, parameter, name, value)


def forget_unsliceable(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> str | None:
    """Clear the state of every parameter whose state cannot be sliced; return the first reason, or None."""
    reason = None
    for parameter in parameters:
        try:
            _check(optimizer, [parameter])
        except ValueError as error:
            reason = reason or str(error)
            for state in _states(optimizer, parameter):
                state.clear()
    return reason


def _levels(optimizer: Any) -> list[Optimizer]:
    """Return the optimizer and those inside it: Lightning, SAM and ZeroRedundancyOptimizer wrap others."""
    found: list[Optimizer] = []
    todo = [optimizer]
    while todo:
        one = todo.pop()
        if isinstance(one, Optimizer):
            found.append(one)
        inner = [value for value in vars(one).values() if isinstance(value, Optimizer)]
        todo += [value for value in inner if all(value is not other for other in found)]
    return found


def _states(optimizer: Optimizer, parameter: nn.Parameter) -> list[dict[str, Any]]:
    states = [level.state[parameter] for level in _levels(optimizer) if parameter in level.state]
    return list({id(state): state for state in states}.values())


def _check_groups(optimizer: Optimizer) -> None:
    """Raise a ValueError if an optimizer keeps state for several parameters together."""
    for level in _levels(optimizer):
        loose: list[tuple[Any, Any]] = [
            (key, value) for key, value in level.state.items() if not isinstance(key, Tensor)
        ]
        loose += [item for group in level.param_groups for item in group.items() if item[0] != "params"]
        for name, value in loose:
            if any(one.numel() > 1 for one in _tensors(value)):
                raise ValueError(
                    f"{type(level).__name__} keeps {name!r} for several parameters together, which cannot be cut like "
                    f"each of them. {_ADVICE}"
                )


def _places(optimizer: Optimizer, parameter: nn.Parameter, name: str, value: Any) -> dict[int, int]:
    """Return by dimension of the parameter the dimension of a state tensor that belongs to it.

    Raises:
        ValueError: The tensor has no known meaning.
    """
    tensors = [one for one in _tensors(value) if one.numel() > 1]
    if not tensors:
        return {}
    refused = f"keeps {name!r} of shape {tuple(tensors[0].shape)} ({tensors[0].dtype})"
    where: dict[int, int] | None = None
    if tensors[0] is value and type(value) in (Tensor, nn.Parameter) and value.dtype in _FLOATS:
        where = _fit(name, tuple(value.shape), tuple(parameter.shape))
        if where is not None and not _MOMENTS.fullmatch(name) and not _is_proven(optimizer, name):
            where = None
    if where is None:
        kind = next(type(level).__name__ for level in _levels(optimizer))
        raise ValueError(
            f"{kind} {refused} for a parameter of shape {tuple(parameter.shape)}, which cannot be cut like it: it is "
            f"not known to hold an entry for each of the parameter's. {_ADVICE}"
        )
    return where


def _fit(name: str, shape: tuple[int, ...], parameter: tuple[int, ...]) -> dict[int, int] | None:
    if len(shape) == len(parameter) and all(a in (b, 1) for a, b in zip(shape, parameter, strict=True)):
        return {dim: dim for dim, size in enumerate(shape) if size == parameter[dim]}
    if "row" in name and shape == parameter[:-1]:  # factored second moments of rows
        return {dim: dim for dim in range(len(shape))}
    if "col" in name and len(parameter) > 1 and shape == (*parameter[:-2], parameter[-1]):  # and of columns
        return {dim: dim for dim in range(len(shape) - 1)} | {len(parameter) - 1: len(shape) - 1}
    return None


def _is_proven(optimizer: Optimizer, name: str) -> bool:
    """Return whether state tensors of this name have the shapes of all parameters, whose sizes are no coincidence."""
    lengths: set[int] = set()
    tells = False
    for level in _levels(optimizer):
        for parameter, state in level.state.items():
            value = state.get(name) if isinstance(state, dict) else None
            if not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if value.shape != parameter.shape:
                return False
            lengths.add(len(parameter) if parameter.dim() == 1 else 0)
            tells |= parameter.dim() > 1 and len(set(parameter.shape)) == parameter.dim()
    return tells or len(lengths - {0}) > 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _tensors(one)


def _after_a_step(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> Optimizer | None:
    """Return a twin of the optimizer after a step with a copy of one parameter of each shape; None if it cannot step.

    Torch's own optimizers need no twin. The twin of an optimizer that holds parameters in other attributes would change
    these parameters.
    """
    levels = _levels(optimizer)
    elsewhere = [
        value for level in levels for key, value in vars(level).items() if key not in ("state", "param_groups")
    ]
    holds = any(isinstance(one, nn.Parameter) for one in _tensors(elsewhere))
    if holds or all(type(level).__module__.startswith("torch.optim.") for level in levels):
        return None
    kinds = {(one.shape, one.dtype): one for one in parameters}
    copies = {id(one): nn.Parameter(one.detach().clone()) for one in kinds.values()}
    for one in copies.values():
        one.grad = torch.ones_like(one)
    twins = {id(level): object.__new__(type(level)) for level in levels}
    for level in levels:
        twin = twins[id(level)]
        for name, value in vars(level).items():
            setattr(twin, name, type(value)() if "hooks" in name else twins.get(id(value), value))
        twin.state = defaultdict(dict)
        twin.param_groups = [
            {**group, "params": [copies[id(one)] for one in group["params"] if id(one) in copies]}
            for group in level.param_groups
        ]
    with torch.random.fork_rng():
        try:
            type(optimizer).step(twins[id(levels[0])])
        except Exception:  # it needs a closure, a device or other parameters; the first cut shows its state
            return None
    return twins[id(levels[0])]


def check_forgettable(optimizer: Optimizer) -> None:
    """Raise a ValueError if an optimizer keeps state for several parameters together, so that none can leave."""
    _check_groups(optimizer)
    for level in _levels(optimizer):
        held = [value for key, value in vars(level).items() if key not in ("state", "param_groups")]
        if any(isinstance(one, nn.Parameter) for one in _tensors(held)):
            raise ValueError(
                f"{type(level).__name__} keeps its parameters in a list of its own, so that none of them can leave it "
                f"during a fit. Use SGD, Adam or AdamW."
            )


def forget_parameters(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Take parameters out of an optimizer, and of those inside it, with their state; all other state stays."""
    gone = {id(one) for one in parameters}
    for level in _levels(optimizer):
        for group in level.param_groups:
            group["params"] = [one for one in group["params"] if id(one) not in gone]
        for one in [one for one in level.state if id(one) in gone]:
            del level.state[one]
