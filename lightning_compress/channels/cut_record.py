"""The record of a cut, from which another process can rebuild the network for a thin state dict.

Shapes say how wide every tensor is, but not how many heads or convolution groups there are, which positions of a
non-persistent buffer stayed, and how wide all of it was before. The record of these travels in the metadata of the
state dict, which survives checkpoints of weights alone and a strict load into the plain class. A dense network has no
record.

    numbers         by module the attributes that its code reads: {"layer.attention": {"num_heads": 2}}
    buffers         by non-persistent buffer and dimension the positions that stayed: {"scale": {0: [0, 3]}}
    dense_shapes    shapes that the cut tensors had before: {"fc.weight": (10, 3)}
    dense_numbers   as `numbers`, before the cut
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_compress.channels.attention import SliceableMultiheadAttention
from lightning_compress.channels.groups import ChannelGroup
from lightning_compress.channels.record_check import KINDS, check_record, check_structure
from lightning_compress.channels.reshapes import Pattern, is_reshape
from lightning_compress.channels.slicing import positions_left, sizes
from lightning_compress.core.structure import structures
from lightning_compress.core.tensors import named_tensors, saved_tensors


class Shapes:
    """The dense network behind one whose shapes may change, as far as it is known.

    A part that was cut by itself has a `Shapes` of its own. The whole and its parts exchange what they know.

    Attributes:
        groups: Free channel groups of the dense network; None where they are not known.
        dense_shapes: By name the shape of every tensor in the dense network.
        dense_numbers: By module the attributes that a cut may change, with their values in the dense network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.groups: list[ChannelGroup] | None = None
        self.dense_numbers: dict[str, dict[str, Any]] = {}
        self._settled: dict[str, tuple[int, ...]] = {}  # dense shapes that no longer follow changes of the model
        self.dense_shapes = _shapes(model)
        self.agree(model)

    def agree(self, model: nn.Module) -> None:
        """Exchange with the parts that were cut by themselves what the dense network was; the whole knows it best."""
        for path, module in model.named_modules():
            inner = shapes_of(module) if module is not model else None
            if inner is None:
                continue
            start = f"{path}."
            self._settled = {start + name: shape for name, shape in inner.dense_shapes.items()} | self._settled
            self._add_numbers({(start + name).rstrip("."): values for name, values in inner.dense_numbers.items()})
            shapes = {name.removeprefix(start): one for name, one in self._settled.items() if name.startswith(start)}
            if any(inner.dense_shapes.get(name, shape) != shape for name, shape in shapes.items()):
                inner.groups = None  # they are those of a thinner network
            inner.dense_shapes |= shapes
            inner._settled |= shapes
            for name, values in self.dense_numbers.items():
                if f"{name}.".startswith(start):
                    inner.dense_numbers[f"{name}."[len(start) :].rstrip(".")] = dict(values)
        self.dense_shapes |= self._settled

    def learn(self, model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
        """Note the groups of the model, or of a part of it, before they are cut."""
        self.agree(model)
        free = [group for group in groups if group.frozen is None]
        noted: dict[str, dict[str, Any]] = {}
        for one in (attribute for group in free for attribute in group.attributes):
            module = model.get_submodule(one.module)
            dense = Pattern.of(one.name).dense if is_reshape(one.name) else None
            noted.setdefault(one.module, {})[one.name] = getattr(module, one.name, dense)
        self._add_numbers(noted)
        now = _shapes(model)
        self.dense_shapes = now | self._settled  # layers may have come, or changed, since the beginning
        self._settled = dict(self.dense_shapes)
        known = {_axes_of(group) for group in self.groups or ()}
        new = [group for group in free if _axes_of(group) not in known]
        whole = self.is_dense(model) or (self.groups is not None and all(self._is_whole(group, now) for group in new))
        self.groups = [*(self.groups or ()), *new] if whole else None
        self.agree(model)  # so that parts know these numbers when they are saved by themselves

    def _is_whole(self, group: ChannelGroup, now: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether a group has all its channels still."""
        axes = [one for one in _axes_of(group) if one[0] in now]
        return all(now[name][dim] == self.dense_shapes[name][dim] for name, dim in axes)

    def is_dense(self, model: nn.Module) -> bool:
        """Return whether no channel has been cut out of the network."""
        now = _shapes(model)
        return all(now.get(name, shape) == shape for name, shape in self.dense_shapes.items())

    def _add_numbers(self, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        """Store numbers of the dense network; a known number keeps its value."""
        for path, values in numbers.items():
            self.dense_numbers[path] = dict(values) | self.dense_numbers.get(path, {})

    def numbers(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return by module the attributes that a cut may change and that shapes do not reveal."""
        found: dict[str, dict[str, Any]] = {}
        for path, names in self.dense_numbers.items():
            module = model.get_submodule(path)
            found[path] = {name: getattr(module, name) for name in names if hasattr(module, name)}
        for path, module in model.named_modules():
            if isinstance(module, SliceableMultiheadAttention):
                found.setdefault(path, {})["head_dim"] = module.head_dim
        return found

    def record(self, model: nn.Module) -> dict[str, Any] | None:
        """Return the record for a state dict of the model; None for the dense network."""
        self.agree(model)
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

    def untold(self, model: nn.Module) -> list[str]:
        """Return what a cut changes that the shapes of a state dict alone do not reveal."""
        members = [member.tensor for group in self.groups or () for member in group.members]
        modules = dict(model.named_modules(remove_duplicate=False))
        numbers = [
            f"{path}.{name}"
            for path, values in self.dense_numbers.items()
            for name in values
            if name not in sizes(modules[path])
        ]
        return [*numbers, *dict.fromkeys(name for name in members if name not in self.dense_shapes)]

    def examine(self, model: nn.Module, incoming: Mapping[str, tuple[int, ...]], record: Mapping[str, Any]) -> None:
        """Check a record and the shapes that come with it; nothing changes.

        Raises:
            RecordError: No cut leaves such a record.
            ValueError: The record is of another dense network, or no cut of this one has these shapes.
        """
        self.agree(model)
        origin, differ = self._origin(incoming, record)
        made_thin = bool(differ) and already(model, incoming)  # the constructor made the model thin
        check_record(
            record, model, incoming, _shapes(model), None if made_thin else self._numbers_before(model, record)
        )
        if differ and not made_thin:
            raise ValueError(
                f"The state dict is of a network that was cut: its {differ[0]} had shape {origin[differ[0]]} before, "
                f"and that of this network has {self.dense_shapes[differ[0]]}. Load it into the class, with the "
                f"arguments, that it was saved from."
            )
        if not made_thin:
            self._check_shapes(model, incoming)

    def follow(self, incoming: Mapping[str, tuple[int, ...]], record: Mapping[str, Any]) -> None:
        """Learn the dense shapes and numbers from a record that was examined and adopted."""
        origin, differ = self._origin(incoming, record)
        if differ:
            self.groups = None
        self._settled |= origin
        self.dense_shapes |= origin
        self._add_numbers(record["dense_numbers"])

    def _origin(
        self, incoming: Mapping[str, tuple[int, ...]], record: Mapping[str, Any]
    ) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """Return the dense shapes of the network in a record, and the names of those that differ from this model's."""
        origin = dict(incoming) | {name: tuple(shape) for name, shape in record["dense_shapes"].items()}
        return origin, [name for name, shape in origin.items() if self.dense_shapes.get(name, shape) != shape]

    def _numbers_before(self, model: nn.Module, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the dense numbers of this model, those that a record names among them where they are known."""
        known = {path: dict(values) for path, values in self.dense_numbers.items()}
        if self.is_dense(model):
            modules = dict(model.named_modules(remove_duplicate=False))
            for kind in ("numbers", "dense_numbers"):
                for path, values in record[kind].items():
                    have = vars(modules[path]) if path in modules else {}
                    known[path] = {name: have[name] for name in values if name in have} | known.get(path, {})
        return known

    def _check_shapes(self, model: nn.Module, incoming: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ValueError if no cut of the dense network, where its groups are known, has these shapes."""
        if self.groups is None:
            return
        tensors = named_tensors(model)
        names: dict[int, list[str]] = {}  # all names of a tensor
        for name, tensor in tensors.items():
            names.setdefault(id(tensor), []).append(name)
        claims: dict[tuple[str, int], list[tuple[ChannelGroup, int]]] = {}
        for group in self.groups:
            for member in (one for one in group.members if one.tensor in tensors):
                for name in names[id(tensors[member.tensor])]:
                    claims.setdefault((name, member.dim), []).append((group, member.index.shape[1]))
        parts = tuple(f"{path}." for path, one in model.named_modules() if one is not model and shapes_of(one))
        left: dict[str, tuple[int, str]] = {}
        for name, shape in incoming.items():
            if name.startswith(parts):  # a part that was cut by itself checks its own
                continue
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


def _axes_of(group: ChannelGroup) -> frozenset[tuple[str, int]]:
    """Return the tensors that a group cuts, with the dimension."""
    return frozenset((one.tensor, one.dim) for one in group.members)


def shapes_of(model: nn.Module) -> Shapes | None:
    """Return the `Shapes` of a module that follows what is loaded into it; None for others."""
    known = (getattr(one, "shapes", None) for one in structures(model))
    return next((one for one in known if isinstance(one, Shapes)), None)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items() if not is_lazy(tensor)}


def already(model: nn.Module, incoming: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether incoming tensors have the module's present shapes."""
    now = _shapes(model)
    return all(now[name] == shape for name, shape in incoming.items())


def merged(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return one record, given those of a module and of its submodules by path.

    Two modules, one within the other, may both have recorded a tensor; the larger of its dense shapes is right.
    """
    found: dict[str, Any] = {kind: {} for kind in KINDS}
    for path, record in records.items():
        check_structure(record)
        for kind, values in record.items():
            for name, value in values.items():
                full = f"{path}.{name}".strip(".")
                known = found[kind].get(full, value)
                found[kind][full] = max(known, value, key=math.prod) if kind == "dense_shapes" else known
    return found


def lost(untold: Sequence[str]) -> str:
    some = ", ".join(untold[:5]) + (f" and {len(untold) - 5} more" if len(untold) > 5 else "")
    return (
        f"The state dict has thinner tensors, but no record of what goes with them ({some}): its metadata was lost, "
        f"or it is of another network. Load the checkpoint as it was saved."
    )


def differing(model: nn.Module, incoming: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Say in words which tensors come with other shapes than the model's."""
    return [
        f"{name} has shape {incoming[name]}, here {shape}"
        for name, shape in _shapes(model).items()
        if incoming.get(name, shape) != shape
    ]
