"""A module takes the shapes of the state dict that is loaded into it, thinner or wider.

Shapes say how wide every tensor is, but not how many heads or convolution groups there are. These numbers travel in the
state dict's metadata, which survives checkpoints of weights alone and a strict load into the plain class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.attention import SliceableMultiheadAttention, make_sliceable
from lightning_compress.core.groups import ChannelGroup
from lightning_compress.core.slicing import sizes

RECORD = "lightning_compress"  # the key in the metadata of the root module


class _NoteNumbers:
    """On saving: note the numbers that follow a cut."""

    def __init__(self, groups: Iterable[ChannelGroup]) -> None:
        self._attributes = [(one.module, one.name) for group in groups for one in group.attributes]

    def numbers(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """The attributes, by module; ordinary ones are told by shapes."""
        found: dict[str, dict[str, Any]] = {}
        for path, name in self._attributes:
            module = model.get_submodule(path)
            if hasattr(module, name):
                found.setdefault(path, {})[name] = getattr(module, name)
        for path, module in model.named_modules():
            if isinstance(module, SliceableMultiheadAttention):
                found.setdefault(path, {})["head_dim"] = module.head_dim
        return found

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
        local_metadata[RECORD] = self.numbers(module)


class _FollowShapes:
    """On loading: take the shapes, if they are those of some cut of this network."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], dense: dict[str, dict[str, Any]]) -> None:
        self._groups, self._dense = groups, dense
        self._dense_shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        incoming = _incoming(module, state_dict, prefix)
        self._check(incoming)
        numbers = local_metadata.get(RECORD)
        if (
            numbers is None
            and self._dense
            and any(shape != self._dense_shapes[name] for name, shape in incoming.items())
        ):
            raise ValueError(
                f"The state dict has thinner tensors, but no record of the numbers that go with them "
                f"({_told(self._dense)}): its metadata was lost. Load the checkpoint as it was saved."
            )
        adopt_shapes(module, incoming, self._dense if numbers is None else numbers)

    def _check(self, incoming: Mapping[str, tuple[int, ...]]) -> None:
        claims: dict[tuple[str, int], list[ChannelGroup]] = {}
        for group in self._groups:
            for member in group.members:
                claims.setdefault((member.tensor, member.dim), []).append(group)
        left: dict[str, tuple[int, str]] = {}
        for name, shape in incoming.items():
            dense = self._dense_shapes[name]
            for dim in range(max(len(shape), len(dense))):
                if len(shape) == len(dense) and shape[dim] == dense[dim]:
                    count = 0
                elif len(shape) != len(dense) or (name, dim) not in claims:
                    raise ValueError(
                        f"{name} has shape {shape} in the state dict and {dense} in the dense network: no cut of its "
                        f"channels leads from one to the other."
                    )
                else:
                    count = dense[dim] - shape[dim]
                for group in claims.get((name, dim), ()):
                    (member,) = (one for one in group.members if (one.tensor, one.dim) == (name, dim))
                    if len(claims[name, dim]) > 1:
                        continue
                    each = member.index.shape[1]
                    dropped = count // each
                    known, where = left.setdefault(group.name, (dropped, name))
                    if count % each or not 0 <= dropped < group.size or dropped != known:
                        raise ValueError(
                            f"{name} has {shape[dim]} of {dense[dim]} positions in the state dict, which is no cut of "
                            f"{group.name!r}, whose channels hold {each} each: {where} says that {known} of its "
                            f"{group.size} channels are gone."
                        )


def follow_checkpoints(model: nn.Module, groups: Iterable[ChannelGroup]) -> list[Any]:
    """Make a model take the shapes of what is loaded into it; returns handles that undo it. Once is enough."""
    if any(isinstance(hook, _NoteNumbers) for hook in model._state_dict_hooks.values()):
        return []
    free = [group for group in groups if group.frozen is None]
    note = _NoteNumbers(free)
    follow = _FollowShapes(model, free, note.numbers(model))
    return [
        model.register_state_dict_post_hook(note),  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(follow),  # type: ignore[no-untyped-call]
    ]


def adopt_shapes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give tensors new shapes, with undefined values, and modules the numbers that go with them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in _tensors(model).items():
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
    found = {name: state_dict.get(prefix + name) for name in _tensors(module)}
    return {name: tuple(value.shape) for name, value in found.items() if isinstance(value, Tensor)}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _told(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{module}.{name}" for module, values in numbers.items() for name in values)


def adopt_state(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict, of a thin network perhaps, into a dense model: shapes, numbers and values.

    Raises:
        RuntimeError: Keys are missing or unexpected, as `load_state_dict` says.
    """
    metadata = getattr(state_dict, "_metadata", {}).get("", {})
    adopt_shapes(model, _incoming(model, state_dict, ""), metadata.get(RECORD, {}))
    with torch.no_grad():
        model.load_state_dict(state_dict)
