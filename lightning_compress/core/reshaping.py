"""A module takes the shapes of the state dict that is loaded into it, thinner or wider."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.attention import SliceableMultiheadAttention, make_sliceable
from lightning_compress.core.groups import ChannelGroup
from lightning_compress.core.record import RECORD, Shapes, already, lost, merged, needing_a_record, shapes_of
from lightning_compress.core.slicing import (
    forget_graphs,
    named_tensors,
    positions_left,
    refit_buffers,
    saved_tensors,
    sizes,
)

log = logging.getLogger(__name__)


class _OnSave:
    """Writes the record."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
        record = self.shapes.record(module)
        if record is not None:
            written = {name: name for name in state_dict}  # pickle writes the same string, not an equal one, only once
            record["dense_shapes"] = {written.get(name, name): one for name, one in record["dense_shapes"].items()}
            local_metadata[RECORD] = record


class _OnLoad:
    """Takes the shapes, if they are those of some cut of this network."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        incoming = _incoming(module, state_dict, prefix)
        _say_wider(module, incoming)
        record = merged(getattr(state_dict, "_metadata", {prefix.rstrip("."): local_metadata}), prefix)
        if record is not None:
            self.shapes.compare_origin(module, incoming, record)
            self.shapes.check(incoming)
            adopt_shapes(module, incoming, record["numbers"], record["buffers"])
            return
        if any(shape != self.shapes.dense_shapes.get(name, shape) for name, shape in incoming.items()):
            if self.shapes.groups is None:
                return  # without a record it is no cut of ours: a strict load tells what does not fit
            self.shapes.check(incoming)
            if untold := self.shapes.untold():
                raise ValueError(lost(untold))
            adopt_shapes(module, incoming, {}, {})
        elif not already(module, incoming):
            adopt_shapes(module, incoming, self.shapes.dense_numbers, {})


def _say_wider(module: nn.Module, incoming: Mapping[str, tuple[int, ...]]) -> None:
    tensors = saved_tensors(module)
    before, after = (
        sum(map(math.prod, shapes)) for shapes in ((tensors[name].shape for name in incoming), incoming.values())
    )
    if after > before:
        log.warning(
            "%s takes the shapes of a checkpoint from before its channels left: %s numbers where it had %s.",
            *(type(module).__name__, f"{after:,}", f"{before:,}"),
        )


class _OnLoadAsLeader:
    """Takes the shapes that are loaded into a copy, with the numbers of the module that it is a copy of."""

    def __init__(self, leader: nn.Module) -> None:
        self.leader = leader

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        shapes = shapes_of(self.leader)
        assert shapes is not None, "it follows checkpoints"
        numbers = shapes.numbers(self.leader)
        adopt_shapes(module, _incoming(module, state_dict, prefix), numbers, positions_left(self.leader))

    def __deepcopy__(self, memo: Any) -> _OnLoadAsLeader:
        return _OnLoadAsLeader(self.leader)


def follow_leader(copy: nn.Module, leader: nn.Module) -> None:
    """Make a copy, such as a moving average, take the shapes of what is loaded into it after its leader was loaded."""
    if not any(
        isinstance(getattr(hook, "hook", hook), _OnLoadAsLeader) for hook in copy._load_state_dict_pre_hooks.values()
    ):
        copy.register_load_state_dict_pre_hook(_OnLoadAsLeader(leader))  # type: ignore[no-untyped-call]


def with_record(state_dict: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """A state dict with the model's metadata, if it has none of its own."""
    if hasattr(state_dict, "_metadata"):
        return state_dict
    found: OrderedDict[str, Tensor] = OrderedDict(state_dict)
    found._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return found


def follow_checkpoints(model: nn.Module, groups: Iterable[ChannelGroup] | None = None) -> list[Any]:
    """Make a model take the shapes of what is loaded into it, thinner or wider, and note its numbers when it is saved.

    Args:
        model: The model; its shapes are those of the dense network when the groups become known.
        groups: Its channel groups: what is loaded must be a cut of them then. Without, shapes are taken if a record
            comes with them, which only networks that may be cut leave.

    Returns:
        Handles that undo it; none if it had been done before.
    """
    known = shapes_of(model)
    shapes = Shapes(model) if known is None else known
    if groups is not None:
        shapes.learn(model, groups)
    if known is not None:
        return []
    return [
        model.register_state_dict_post_hook(_OnSave(shapes)),  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(_OnLoad(shapes)),  # type: ignore[no-untyped-call]
    ]


def adopt_shapes(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    numbers: Mapping[str, Mapping[str, Any]],
    positions: Mapping[str, Mapping[int, Sequence[int]]],
) -> None:
    """Give tensors new shapes, with undefined values, and modules the numbers that go with them.

    Args:
        model: The module, changed in place.
        shapes: By name the new shapes.
        numbers: By module the attributes to set.
        positions: By name of a non-persistent buffer what stays of the dense one, as `positions_left` tells it.

    Raises:
        ValueError: A buffer has no such positions; the module is as it was then.
    """
    refit_buffers(model, positions)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in named_tensors(model).items():
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name]):
            tensor.grad = None
            tensor.data = tensor.data.new_empty(shapes[name])
            if tensor.requires_grad:
                forget_graphs(tensor)
    for name, values in numbers.items():
        if type(modules[name]) is nn.MultiheadAttention:
            make_sliceable(modules[name])
        for attribute, value in values.items():
            setattr(modules[name], attribute, tuple(value) if isinstance(value, list) else value)
    for module in modules.values():
        for attribute, value in sizes(module).items():
            if getattr(module, attribute) != value:
                setattr(module, attribute, value)
        if isinstance(module, SliceableMultiheadAttention):
            module.refresh(head_dim=module.head_dim)


def _incoming(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    found = {name: state_dict.get(prefix + name) for name in saved_tensors(module)}
    return {name: tuple(value.shape) for name, value in found.items() if isinstance(value, Tensor)}


def adopt_state(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict, of a thin network perhaps, into a dense model: shapes, numbers and values.

    Raises:
        RuntimeError: Keys are missing or unexpected, as `load_state_dict` says.
        ValueError: Shapes do not tell everything, and the record that does was lost.
    """
    incoming = _incoming(model, state_dict, "")
    handles = follow_checkpoints(model)
    try:
        if merged(getattr(state_dict, "_metadata", {}), "") is None:
            unclear = needing_a_record(model, incoming)
            if unclear:
                raise ValueError(lost(unclear))
            adopt_shapes(model, incoming, {}, {})
        with torch.no_grad():
            model.load_state_dict(state_dict)
    except BaseException:
        _remove(handles)
        raise
    shapes = shapes_of(model)
    assert shapes is not None, "it follows checkpoints"
    if shapes.is_dense(model):
        _remove(handles)


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
