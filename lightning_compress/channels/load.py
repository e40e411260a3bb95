"""A module takes the shapes of the state dict that is loaded into it, thinner or wider."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress.channels.attention import SliceableMultiheadAttention, make_sliceable
from lightning_compress.channels.cut_record import Shapes, already, differing, lost, merged, shapes_of
from lightning_compress.channels.groups import ChannelGroup
from lightning_compress.channels.reshapes import adapt, is_reshape
from lightning_compress.channels.slicing import positions_left, refit_buffers, sizes
from lightning_compress.core.hooks import Removable
from lightning_compress.core.records import records
from lightning_compress.core.structure import Arriving, Structure, following, structures
from lightning_compress.core.tensors import named_tensors, saved_tensors
from lightning_compress.core.undo import as_before_on_error, forget_graphs

_EXTRA = "_extra_state"  # torch's name for it
log = logging.getLogger(__name__)


class CutNetwork(Structure):
    """The shapes of a network whose channels were cut, or may be cut later."""

    kind = "cut"

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    @classmethod
    def new(cls, module: nn.Module, name: str) -> CutNetwork:
        return cls(Shapes(module))

    @classmethod
    def gather(cls, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        return {"": merged(records)} if records else {}

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        return self.shapes.record(module)

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        self.shapes.examine(module, _incoming(module, arriving.state_dict, arriving.prefix), record)

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        self.shapes.agree(module)
        incoming = _incoming(module, arriving.state_dict, arriving.prefix)
        # torch itself refuses a strict load of other names
        fails = arriving.strict and _other_names(module, arriving.state_dict, arriving.prefix)
        if record is not None:
            if not fails:
                _adopt(module, incoming, record["numbers"], record["buffers"])
                self.shapes.follow(incoming, record)
        elif all(shape == self.shapes.dense_shapes.get(name, shape) for name, shape in incoming.items()):
            if not fails and not already(module, incoming):
                _adopt(module, incoming, self.shapes.dense_numbers, {})
        elif already(module, incoming) and self.shapes.groups is not None and (untold := self.shapes.untold(module)):
            raise ValueError(lost(untold))
        # Other shapes without a record come from no cut, and torch's load says which of them do not fit.


class CutCopy(Structure):
    """A copy of a network, such as a moving average, that takes the shapes of its leader."""

    kind = "cut"

    def __init__(self, leader: nn.Module) -> None:
        self.leader = leader

    def write(self, module: nn.Module) -> None:
        return None

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        pass

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        shapes, incoming = shapes_of(self.leader), _incoming(module, arriving.state_dict, arriving.prefix)
        assert shapes is not None, "it follows checkpoints"
        if already(self.leader, incoming):  # else the state dict is of another network, which torch's load refuses
            adopt_shapes(module, incoming, shapes.numbers(self.leader), positions_left(self.leader))

    def __deepcopy__(self, memo: Any) -> CutCopy:
        return CutCopy(self.leader)


def _adopt(module: nn.Module, incoming: Mapping[str, tuple[int, ...]], numbers: Any, positions: Any) -> None:
    _say_wider(module, incoming)
    adopt_shapes(module, incoming, numbers, positions)


def _other_names(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Return whether a state dict has other names than the module; torch adds missing batch norms' counters itself."""
    mine = {name for name in saved_tensors(module) if not name.endswith("num_batches_tracked")}
    theirs = {name[len(prefix) :] for name in state_dict if name.startswith(prefix) and not is_extra(name)}
    return not mine <= theirs or not theirs <= set(saved_tensors(module))


def is_extra(name: str) -> bool:
    """Return whether an entry of a state dict comes from a module's `get_extra_state`, and so may be any value."""
    return str(name).rpartition(".")[2] == _EXTRA


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


def follow_leader(copy: nn.Module, leader: nn.Module) -> None:
    """Make a copy, such as a moving average, take its leader's shapes when it is loaded after its leader."""
    if not any(isinstance(one, CutCopy) for one in structures(copy)):
        CutCopy(leader).attach(copy)


def with_record(state_dict: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Return a state dict with the model's metadata, unless it has metadata of its own."""
    if hasattr(state_dict, "_metadata"):
        return state_dict
    found: OrderedDict[str, Tensor] = OrderedDict(state_dict)
    found._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return found


def follow_checkpoints(model: nn.Module, groups: Iterable[ChannelGroup] | None = None) -> list[Removable]:
    """Make a model take the shapes of every state dict that is loaded into it, and write a record when it is saved.

    Args:
        model: The model, in place. Tensors that no cut has changed have the shapes of the dense network.
        groups: Channel groups of the model. State dicts must then be cuts of these groups. Without groups the model
            takes shapes that come with a record.

    Returns:
        Handles that undo it; none if the model followed before.
    """
    known = shapes_of(model)
    shapes = Shapes(model) if known is None else known
    if groups is not None:
        shapes.learn(model, groups)
    return CutNetwork(shapes).attach(model) if known is None else []


@torch.inference_mode(False)  # tensors that are made in inference mode can never be trained
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
        positions: Positions of non-persistent buffers that stay, as `positions_left` returns them.

    Raises:
        ValueError: A buffer has no such positions; the module does not change.
    """
    refit_buffers(model, positions)
    modules = dict(model.named_modules(remove_duplicate=False))
    changed: set[str] = set()
    for name, tensor in named_tensors(model).items():
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name]):
            tensor.grad = None
            tensor.data = tensor.data.new_empty(shapes[name])
            if tensor.requires_grad:
                forget_graphs(tensor)
            changed.add(name.rpartition(".")[0])
    for name, module in modules.items():  # attention that was not cut keeps its class
        other = any(vars(module).get(attribute) != value for attribute, value in numbers.get(name, {}).items())
        if type(module) is nn.MultiheadAttention and (other or name in changed):
            make_sliceable(module)
    for name, values in numbers.items():
        if any(map(is_reshape, values)):
            adapt(modules[name])
        for attribute, value in values.items():
            setattr(modules[name], attribute, tuple(value) if isinstance(value, list) else value)
    for module in modules.values():
        for attribute, value in sizes(module).items():
            if getattr(module, attribute) != value:
                setattr(module, attribute, value)
        if isinstance(module, SliceableMultiheadAttention):
            module.refresh(head_dim=module.head_dim)


def _incoming(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    found = {name: state_dict.get(prefix + name) for name, one in saved_tensors(module).items() if not is_lazy(one)}
    return {name: tuple(value.shape) for name, value in found.items() if isinstance(value, Tensor)}


def has_record(state_dict: Mapping[str, Any]) -> bool:
    """Return whether a state dict has the record of a cut.

    Raises:
        RecordError: No cut leaves such a record.
    """
    found = records(getattr(state_dict, "_metadata", None)).get("cut")
    return found is not None and merged(found) is not None


def adopt_state(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load the state dict of a network that any technique may have changed into a dense model of its class.

    Raises:
        RuntimeError: Keys are missing or unexpected, as `load_state_dict` says.
        ValueError: The shapes are those of a thin network, whose record was lost.
    """
    incoming = _incoming(model, state_dict, "")
    handles = follow_checkpoints(model)
    try:
        if not has_record(state_dict) and (unexplained := differing(model, incoming)):
            raise ValueError(lost(unexplained))
        with following(model), torch.no_grad(), as_before_on_error(model, values=True):
            model.load_state_dict(state_dict)
    except BaseException:
        _remove(handles)
        raise
    shapes = shapes_of(model)
    assert shapes is not None, "it follows checkpoints"
    if shapes.is_dense(model):
        _remove(handles)


def _remove(handles: Iterable[Removable]) -> None:
    for handle in handles:
        handle.remove()
