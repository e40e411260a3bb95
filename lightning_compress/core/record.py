"""The record of a cut: what a state dict must say beside its tensors, so that another process can rebuild the network.

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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.core.attention import SliceableMultiheadAttention
from lightning_compress.core.attributes import NUMBERS
from lightning_compress.core.groups import ChannelGroup
from lightning_compress.core.slicing import named_tensors, positions_left, saved_tensors

RECORD = "lightning_compress"  # the key in the metadata of a module that was cut


class Shapes:
    """What is known of a network whose shapes may change: its groups, and its shapes and numbers before any cut."""

    def __init__(self, model: nn.Module) -> None:
        self.groups: list[ChannelGroup] | None = None  # of the dense network
        self.dense_shapes = _shapes(model)
        self.dense_numbers: dict[str, dict[str, Any]] = {}
        self._told: dict[str, tuple[int, ...]] = {}  # dense shapes that a record, or a part that was cut, told of
        for path, module in model.named_modules():
            if module is not model and (inner := shapes_of(module)) is not None:  # a part that was cut by itself
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
        if differ and not already(model, incoming):
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


def shapes_of(model: nn.Module) -> Shapes | None:
    """What a module that follows checkpoints knows of itself; None for others."""
    known = (getattr(hook, "shapes", None) for hook in model._state_dict_hooks.values())
    return next((one for one in known if isinstance(one, Shapes)), None)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}


def already(model: nn.Module, incoming: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether what is loaded has the shapes that the module has."""
    now = _shapes(model)
    return all(now[name] == shape for name, shape in incoming.items())


def merged(metadata: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, Any] | None:
    """The records of a module and of all that it holds as one; None if there is none.

    What was cut as a part of two modules, one within the other, is in both records, and its dense sizes are the larger.
    """
    found: dict[str, Any] | None = None
    for path, entry in metadata.items():
        if RECORD not in entry or not f"{path}.".startswith(prefix):
            continue
        start = f"{path}."[len(prefix) :].lstrip(".")
        found = found or {"numbers": {}, "buffers": {}, "dense_shapes": {}, "dense_numbers": {}}
        for kind, values in entry[RECORD].items():
            for name, value in values.items():
                full = f"{start}{name}".rstrip(".")
                known = found[kind].get(full, value)
                found[kind][full] = max(known, value, key=math.prod) if kind == "dense_shapes" else known
    return found


def lost(untold: Sequence[str]) -> str:
    return (
        f"The state dict has thinner tensors, but no record of what goes with them ({', '.join(untold)}): its metadata "
        f"was lost. Load the checkpoint as it was saved."
    )


def needing_a_record(model: nn.Module, incoming: Mapping[str, tuple[int, ...]]) -> list[str]:
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
