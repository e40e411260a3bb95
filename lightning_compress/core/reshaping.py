"""A module takes the shapes of the state dict that is loaded into it, thinner or wider.

Shapes say how wide every tensor is, but not how many heads or convolution groups there are. These numbers travel in the
state dict's metadata, which survives checkpoints of weights alone and a strict load into the plain class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.attention import SliceableMultiheadAttention, make_sliceable
from lightning_compress.core.attributes import NUMBERS
from lightning_compress.core.groups import ChannelGroup
from lightning_compress.core.slicing import named_tensors, sizes

RECORD = "lightning_compress"  # the key in the metadata of the root module


class _Shapes:
    """What is known of a network whose shapes may change: its groups, and its shapes and numbers before any cut."""

    def __init__(self, model: nn.Module) -> None:
        self.groups: list[ChannelGroup] | None = None
        self.dense_shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        self.dense_numbers: dict[str, dict[str, Any]] = {}
        self.loaded_numbers: dict[str, dict[str, Any]] = {}

    def learn(self, model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
        """Take the groups, once."""
        if self.groups is None:
            self.groups = [group for group in groups if group.frozen is None]
            self.dense_shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
            self.dense_numbers = self.numbers(model)

    def numbers(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """The attributes that follow a cut, by module; ordinary ones are told by shapes."""
        found: dict[str, dict[str, Any]] = {}
        for one in (attribute for group in self.groups or () for attribute in group.attributes):
            module = model.get_submodule(one.module)
            if hasattr(module, one.name):
                found.setdefault(one.module, {})[one.name] = getattr(module, one.name)
        for path, module in model.named_modules():
            if isinstance(module, SliceableMultiheadAttention):
                found.setdefault(path, {})["head_dim"] = module.head_dim
        return found

    def check(self, incoming: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ValueError if no cut of the dense network has these shapes."""
        claims: dict[tuple[str, int], list[tuple[ChannelGroup, int]]] = {}
        for group in self.groups or ():
            for member in group.members:
                claims.setdefault((member.tensor, member.dim), []).append((group, member.index.shape[1]))
        left: dict[str, tuple[int, str]] = {}
        for name, shape in incoming.items():
            dense = self.dense_shapes[name]
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
    """Notes the numbers."""

    def __init__(self, shapes: _Shapes) -> None:
        self.shapes = shapes

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
        local_metadata[RECORD] = self.shapes.numbers(module)


class _OnLoad:
    """Takes the shapes, if they are those of some cut of this network."""

    def __init__(self, shapes: _Shapes) -> None:
        self.shapes = shapes

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        incoming = _incoming(module, state_dict, prefix)
        numbers = local_metadata.get(RECORD)
        if self.shapes.groups is None:
            if numbers is not None:  # without a record it is no cut of ours: a strict load tells what does not fit
                adopt_shapes(module, incoming, numbers)
                self.shapes.loaded_numbers = numbers
            return
        self.shapes.check(incoming)
        dense = self.shapes.dense_numbers
        thin = any(shape != self.shapes.dense_shapes[name] for name, shape in incoming.items())
        if numbers is None and dense and thin:
            raise ValueError(
                f"The state dict has thinner tensors, but no record of the numbers that go with them "
                f"({_told(dense)}): its metadata was lost. Load the checkpoint as it was saved."
            )
        adopt_shapes(module, incoming, dense if numbers is None else numbers)


class _OnLoadAsLeader:
    """Takes the shapes that are loaded into a copy, with the numbers of the module that it is a copy of."""

    def __init__(self, leader: nn.Module) -> None:
        self.leader = leader

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        shapes = next(hook.shapes for hook in self.leader._state_dict_hooks.values() if isinstance(hook, _OnSave))
        numbers = shapes.loaded_numbers if shapes.groups is None else shapes.numbers(self.leader)
        adopt_shapes(module, _incoming(module, state_dict, prefix), numbers)

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
    known = [hook.shapes for hook in model._state_dict_hooks.values() if isinstance(hook, _OnSave)]
    shapes = known[0] if known else _Shapes(model)
    if groups is not None:
        shapes.learn(model, groups)
    if known:
        return []
    return [
        model.register_state_dict_post_hook(_OnSave(shapes)),  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(_OnLoad(shapes)),  # type: ignore[no-untyped-call]
    ]


def adopt_shapes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give tensors new shapes, with undefined values, and modules the numbers that go with them."""
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


def _incoming(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    found = {name: state_dict.get(prefix + name) for name in named_tensors(module)}
    return {name: tuple(value.shape) for name, value in found.items() if isinstance(value, Tensor)}


def _told(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{module}.{name}" for module, values in numbers.items() for name in values)


def _needing_a_record(model: nn.Module, incoming: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Numbers, near tensors that are thinner, that shapes alone do not tell."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, tensor in named_tensors(model).items():
        if incoming.get(name, tuple(tensor.shape)) == tuple(tensor.shape):
            continue
        own = name.rpartition(".")[0]
        for owner in dict.fromkeys((own, own.rpartition(".")[0])):
            numbers = [
                one for one in ("groups", "num_groups", *NUMBERS) if getattr(modules[owner], one, 1) not in (1, None)
            ]
            found += [f"{owner}.{one}" for one in numbers]
    return list(dict.fromkeys(found))


def adopt_state(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict, of a thin network perhaps, into a dense model: shapes, numbers and values.

    Raises:
        RuntimeError: Keys are missing or unexpected, as `load_state_dict` says.
        ValueError: Shapes do not tell everything, and the record that does was lost.
    """
    numbers, records = {}, 0
    for prefix, entry in getattr(state_dict, "_metadata", {}).items():
        records += RECORD in entry
        for path, values in entry.get(RECORD, {}).items():
            numbers[f"{prefix}.{path}".strip(".")] = values
    incoming = _incoming(model, state_dict, "")
    unclear = [] if records else _needing_a_record(model, incoming)
    if unclear:
        raise ValueError(
            f"The state dict has thinner tensors, but no record of the numbers that go with them "
            f"({', '.join(unclear)}): its metadata was lost. Load the checkpoint as it was saved."
        )
    adopt_shapes(model, incoming, numbers)
    with torch.no_grad():
        model.load_state_dict(state_dict)
