"""A module takes the shapes of the state dict that is loaded into it, thinner or wider.

Shapes say how wide every tensor is, but not how many heads or convolution groups there are, which positions of a
non-persistent buffer stayed, and how wide all of it was before. The record of this travels in the state dict's
metadata, which survives checkpoints of weights alone and a strict load into the plain class. Dense networks have none.

    numbers         by module, what its code reads: {"layer.attention": {"num_heads": 2}}
    buffers         by non-persistent buffer and dimension, the positions that stayed: {"scale": {0: [0, 3]}}
    dense_shapes    of the tensors that were cut: {"fc.weight": (10, 3)}
    dense_numbers   of all modules that have some
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.attention import SliceableMultiheadAttention, make_sliceable
from lightning_compress.core.attributes import NUMBERS
from lightning_compress.core.groups import ChannelGroup
from lightning_compress.core.slicing import named_tensors, positions_left, refit_buffers, saved_tensors, sizes

RECORD = "lightning_compress"  # the key in the metadata of a module that was cut


class _Shapes:
    """What is known of a network whose shapes may change: its groups, and its shapes and numbers before any cut."""

    def __init__(self, model: nn.Module) -> None:
        self.groups: list[ChannelGroup] | None = None  # of the dense network
        self.dense_shapes = _shapes(model)
        self.dense_numbers: dict[str, dict[str, Any]] = {}
        self._told: dict[str, tuple[int, ...]] = {}  # dense shapes that a record, or a part that was cut, told of
        for path, module in model.named_modules():
            if module is not model and (inner := _shapes_of(module)) is not None:  # a part that was cut by itself
                self._told |= {f"{path}.{name}": shape for name, shape in inner.dense_shapes.items()}
                self._add_numbers({f"{path}.{name}".rstrip("."): one for name, one in inner.dense_numbers.items()})
        self.dense_shapes |= self._told

    def learn(self, model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
        """Take the groups, once."""
        if self.groups is not None:
            return
        free = [group for group in groups if group.frozen is None]
        noted: dict[str, dict[str, Any]] = {}
        for one in (attribute for group in free for attribute in group.attributes):
            module = model.get_submodule(one.module)
            if hasattr(module, one.name):
                noted.setdefault(one.module, {})[one.name] = getattr(module, one.name)
        self._add_numbers(noted)
        self.dense_shapes = _shapes(model) | self._told  # layers may have come, or changed, since the beginning
        if self.is_dense(model):  # the groups of a network that was cut before lack what has left
            self.groups = free

    def is_dense(self, model: nn.Module) -> bool:
        """Whether nothing has been cut out of the network."""
        now = _shapes(model)
        return all(now.get(name, shape) == shape for name, shape in self.dense_shapes.items())

    def _add_numbers(self, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        """Note the numbers of the dense network; what is known already stays."""
        for path, values in numbers.items():
            self.dense_numbers[path] = dict(values) | self.dense_numbers.get(path, {})

    def numbers(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """The attributes that follow a cut, by module; ordinary ones are told by shapes."""
        found: dict[str, dict[str, Any]] = {}
        for path, names in self.dense_numbers.items():
            module = model.get_submodule(path)
            found[path] = {name: getattr(module, name) for name in names if hasattr(module, name)}
        for path, module in model.named_modules():
            if isinstance(module, SliceableMultiheadAttention):
                found.setdefault(path, {})["head_dim"] = module.head_dim
        return found

    def record(self, model: nn.Module) -> dict[str, Any] | None:
        """What a state dict needs to say beside its tensors; None for the dense network."""
        if self.is_dense(model):
            return None
        now = _shapes(model)
        cut = {name: shape for name, shape in self.dense_shapes.items() if now.get(name, shape) != shape}
        return {
            "numbers": self.numbers(model),
            "buffers": positions_left(model),
            "dense_shapes": cut,
            "dense_numbers": self.dense_numbers,
        }

    def untold(self) -> list[str]:
        """What follows a cut and is told by no shape in a state dict."""
        members = [member.tensor for group in self.groups or () for member in group.members]
        numbers = [f"{path}.{name}" for path, values in self.dense_numbers.items() for name in values]
        return [*numbers, *dict.fromkeys(name for name in members if name not in self.dense_shapes)]

    def compare_origin(
        self, model: nn.Module, incoming: Mapping[str, tuple[int, ...]], record: Mapping[str, Any]
    ) -> None:
        """Learn what the dense network was, or raise a ValueError if it was not this one."""
        origin = dict(incoming) | record["dense_shapes"]
        differ = [name for name, shape in origin.items() if self.dense_shapes.get(name, shape) != shape]
        if differ and not _already(model, incoming):
            raise ValueError(
                f"The state dict is of a network that was cut: its {differ[0]} had shape {origin[differ[0]]} before, "
                f"and that of this network has {self.dense_shapes[differ[0]]}. Load it into the class, with the "
                f"arguments, that it was saved from."
            )
        if differ:  # the module was made thin
            self.groups = None
        self._told |= origin
        self.dense_shapes |= origin
        self._add_numbers(record["dense_numbers"])

    def check(self, incoming: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ValueError if no cut of the dense network, where its groups are known, has these shapes."""
        if self.groups is None:
            return
        claims: dict[tuple[str, int], list[tuple[ChannelGroup, int]]] = {}
        for group in self.groups:
            for member in group.members:
                claims.setdefault((member.tensor, member.dim), []).append((group, member.index.shape[1]))
        left: dict[str, tuple[int, str]] = {}
        for name, shape in incoming.items():
            dense = self.dense_shapes.get(name, shape)
            differ = [dim for dim, (a, b) in enumerate(zip(shape, dense, strict=False)) if a != b]
            if len(shape) != len(dense) or any((name, dim) not in claims for dim in differ):
                raise ValueError(
                    f"{name} has shape {shape} in the state dict and {dense} in the dense network: no cut of its "
                    f"channels leads from one to the other."
                )
            for dim in range(len(dense)):
                holders = claims.get((name, dim), [])
                if len(holders) != 1:
                    continue
                ((group, each),) = holders
                dropped, rest = divmod(dense[dim] - shape[dim], each)
                known, where = left.setdefault(group.name, (dropped, name))
                if rest or not 0 <= dropped < group.size or dropped != known:
                    raise ValueError(
                        f"{name} has {shape[dim]} of {dense[dim]} positions in the state dict, which is no cut of "
                        f"{group.name!r}, whose channels hold {each} each: {where} says that {known} of its "
                        f"{group.size} channels are gone."
                    )


class _OnSave:
    """Writes the record."""

    def __init__(self, shapes: _Shapes) -> None:
        self.shapes = shapes

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
        record = self.shapes.record(module)
        if record is not None:
            written = {name: name for name in state_dict}  # pickle writes the same string, not an equal one, only once
            record["dense_shapes"] = {written.get(name, name): one for name, one in record["dense_shapes"].items()}
            local_metadata[RECORD] = record


class _OnLoad:
    """Takes the shapes, if they are those of some cut of this network."""

    def __init__(self, shapes: _Shapes) -> None:
        self.shapes = shapes

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        incoming = _incoming(module, state_dict, prefix)
        record = _merged(getattr(state_dict, "_metadata", {prefix.rstrip("."): local_metadata}), prefix)
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
                raise ValueError(_lost(untold))
            adopt_shapes(module, incoming, {}, {})
        elif not _already(module, incoming):
            adopt_shapes(module, incoming, self.shapes.dense_numbers, {})


class _OnLoadAsLeader:
    """Takes the shapes that are loaded into a copy, with the numbers of the module that it is a copy of."""

    def __init__(self, leader: nn.Module) -> None:
        self.leader = leader

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        shapes = _shapes_of(self.leader)
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
    known = _shapes_of(model)
    shapes = _Shapes(model) if known is None else known
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


def _shapes_of(model: nn.Module) -> _Shapes | None:
    return next((hook.shapes for hook in model._state_dict_hooks.values() if isinstance(hook, _OnSave)), None)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}


def _incoming(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    found = {name: state_dict.get(prefix + name) for name in saved_tensors(module)}
    return {name: tuple(value.shape) for name, value in found.items() if isinstance(value, Tensor)}


def _already(model: nn.Module, incoming: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether what is loaded has the shapes that the module has."""
    now = _shapes(model)
    return all(now[name] == shape for name, shape in incoming.items())


def _merged(metadata: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, Any] | None:
    """The records of a module and of all that it holds as one; None if there is none.

    What was cut as a part of two modules, one within the other, is in both records, and its dense sizes are the larger.
    """
    merged: dict[str, Any] | None = None
    for path, entry in metadata.items():
        if RECORD not in entry or not f"{path}.".startswith(prefix):
            continue
        start = f"{path}."[len(prefix) :].lstrip(".")
        merged = merged or {"numbers": {}, "buffers": {}, "dense_shapes": {}, "dense_numbers": {}}
        for kind, values in entry[RECORD].items():
            for name, value in values.items():
                full = f"{start}{name}".rstrip(".")
                known = merged[kind].get(full, value)
                merged[kind][full] = max(known, value, key=math.prod) if kind == "dense_shapes" else known
    return merged


def _lost(untold: Sequence[str]) -> str:
    return (
        f"The state dict has thinner tensors, but no record of what goes with them ({', '.join(untold)}): its metadata "
        f"was lost. Load the checkpoint as it was saved."
    )


def _needing_a_record(model: nn.Module, incoming: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Numbers and non-persistent buffers, near tensors that are thinner, that shapes alone do not tell."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[str] = []
    for name, tensor in named_tensors(model).items():
        if incoming.get(name, tuple(tensor.shape)) == tuple(tensor.shape):
            continue
        own = name.rpartition(".")[0]
        for owner in dict.fromkeys((own, own.rpartition(".")[0])):
            numbers = [
                one for one in ("groups", "num_groups", *NUMBERS) if getattr(modules[owner], one, 1) not in (1, None)
            ]
            found += [f"{owner}.{one}" for one in numbers]
            gone = {dense for dense, thin in zip(tensor.shape, incoming[name], strict=False) if dense != thin}
            hidden = ((one, modules[owner]._buffers[one]) for one in modules[owner]._non_persistent_buffers_set)
            found += [f"{owner}.{one}" for one, buffer in hidden if buffer is not None and gone & {*buffer.shape}]
    return list(dict.fromkeys(found))


def adopt_state(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict, of a thin network perhaps, into a dense model: shapes, numbers and values.

    Raises:
        RuntimeError: Keys are missing or unexpected, as `load_state_dict` says.
        ValueError: Shapes do not tell everything, and the record that does was lost.
    """
    incoming = _incoming(model, state_dict, "")
    handles = follow_checkpoints(model)
    try:
        if _merged(getattr(state_dict, "_metadata", {}), "") is None:
            unclear = _needing_a_record(model, incoming)
            if unclear:
                raise ValueError(_lost(unclear))
            adopt_shapes(model, incoming, {}, {})
        with torch.no_grad():
            model.load_state_dict(state_dict)
    except BaseException:
        _remove(handles)
        raise
    shapes = _shapes_of(model)
    assert shapes is not None, "it follows checkpoints"
    if shapes.is_dense(model):
        _remove(handles)


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
