"""The record of a replaced layer, in the metadata of a state dict, from which the dense layer is replaced as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from lightning_compress.core.hooks import Removable
from lightning_compress.core.records import RecordError, kind_class, records, shown
from lightning_compress.core.structure import Arriving, Structure, structures
from lightning_compress.core.tensors import saved_tensors
from lightning_compress.replacement.layer import LayerShape, UnreplaceableError, keeping_random_state, linear_map
from lightning_compress.replacement.swap import Replaced, replaced, restore, size_of, swap

_MOST, _LEAST = 256, 2**20  # a record asks for no memory beyond so many times the layer's, and so many numbers
_PLAIN = (bool, int, float, str, type(None))


class ReplacedStructure(Structure):
    """A layer that has become another module. A state dict with the layer's own tensors restores it.

    A room has a subclass with its `kind`, and the classes of its `forms`. The record:

        {"form": "linear", "numbers": {"rank": 8}, "of": {"kind": "linear", "shape": [100, 300], "bias": True, ...}}

    Attributes:
        forms: The forms that a layer may take, by name.
    """

    forms: ClassVar[Mapping[str, type[Replaced]]]
    renames: ClassVar[bool] = True

    @classmethod
    def when_refused(cls, model: nn.Module) -> str:
        return (
            f"The state dict is of a network with replaced layers: load_compressed replaces the same layers in a new "
            f"{type(model).__name__}, and then loads it."
        )

    @classmethod
    def when_lost(cls, model: nn.Module, names: list[str]) -> str | None:
        return (
            f"{type(model).__name__} was loaded from a network with other layers at {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more' if names[3:] else ''}, whose tensors it has not taken: use "
            f"load_compressed, to have the network with these layers."
        )

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        if not isinstance(module, Replaced) or self.forms.get(module.form) is not type(module):
            return None  # a load has restored the layer, or another kind has replaced it
        return {"form": module.form, "numbers": dict(module.numbers), "of": module.of.record()}

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        path = arriving.prefix.rstrip(".")
        form, numbers = record.get("form"), record.get("numbers")
        if not isinstance(form, str) or form not in self.forms or set(record) != {"form", "numbers", "of"}:
            raise RecordError(
                f"The record of the layer {path!r} that was replaced has the form {shown(form)}; expected one of "
                f"{', '.join(self.forms)}, and its numbers and sizes."
            )
        if not isinstance(numbers, Mapping) or not all(_plain(*one) for one in numbers.items()):
            raise RecordError(
                f"The record of the layer {path!r} that was replaced has the numbers {shown(numbers)}; expected plain "
                f"values by name."
            )
        own = _dense_sizes(module, path)
        of = LayerShape.of_record(record.get("of"), dtype=own.dtype, device=own.device)
        if not (isinstance(module, Replaced) and of.same(module.of)):
            _check_fit(of, own, path, arriving)
        try:
            self.forms[form].check(of, numbers)
            if (size := size_of(self.forms[form], of, numbers)) > (most := _MOST * own.parameters + _LEAST):
                raise ValueError(f"its parts would have {size:,} parameters; expected {most:,} at most")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
            raise RecordError(
                f"The record of the layer {path!r} that was replaced has the numbers {shown(dict(numbers))}, with "
                f"which no {own.kind} layer of shape {of.shape} takes the form {form!r}: {error}"
            ) from error

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        if record is None:
            if isinstance(module, Replaced) and _is_dense(module, arriving):
                restore(module)
            return
        form, numbers = self.forms[record["form"]], record["numbers"]
        own = _dense_sizes(module, arriving.prefix)
        of = LayerShape.of_record(record["of"], dtype=own.dtype, device=own.device)
        if isinstance(module, Replaced):
            if type(module) is form and module.numbers == dict(numbers) and module.of.same(of):
                return
            restore(module)
        with keeping_random_state(of):
            swap(module, form, numbers, of=of)


class ReplacedCopy(Structure):
    """A copy of a network, such as a moving average, whose layers are replaced as those of its leader are."""

    kind: ClassVar[str] = "low_rank"  # stands for all kinds of replacement

    def __init__(self, leader: nn.Module) -> None:
        self.leader = leader

    def write(self, module: nn.Module) -> None:
        return None

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        pass

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        follow_layers(module, self.leader)

    def __deepcopy__(self, memo: Any) -> ReplacedCopy:
        return ReplacedCopy(self.leader)


def note_replaced(layer: nn.Module, kind: str) -> list[Removable]:
    """Have the state dicts of a replaced layer say what it is, with a record of a kind; return handles to undo it."""
    found = kind_class(kind)
    assert issubclass(found, ReplacedStructure)
    return [] if any(type(one) is found for one in structures(layer)) else found().attach(layer)


def kind_of(layer: Replaced) -> str | None:
    """Return the kind of the record that a replaced layer writes; None before `note_replaced`."""
    return next((one.kind for one in structures(layer) if isinstance(one, ReplacedStructure)), None)


def follow_layers(copy: nn.Module, leader: nn.Module, *, values: bool = False) -> Callable[[], None]:
    """Replace the layers of a copy as those of its leader are replaced.

    Args:
        copy: The copy, changed in place.
        leader: A network with the same modules.
        values: Whether the new parts get the leader's values, or else undefined ones.

    Returns:
        A function that undoes what was replaced.
    """
    theirs, undo = replaced(leader), ExitStack()
    for path, own in replaced(copy).items():
        other = theirs.get(path)
        if other is None or type(other) is not type(own) or other.numbers != own.numbers or not other.of.same(own.of):
            restore(own)
    modules = dict(copy.named_modules())
    for path, other in theirs.items():
        one = modules.get(path)
        if one is not None and not isinstance(one, Replaced):
            like = linear_map(one).sizes
            of = replace(other.of, dtype=like.dtype, device=like.device)
            with keeping_random_state(of):
                undo.callback(swap(one, type(other), other.numbers, saved_tensors(other) if values else None, of=of))
            for handle in note_replaced(one, kind) if (kind := kind_of(other)) is not None else ():
                undo.callback(handle.remove)
    return undo.close


def follow_replaced(copy: nn.Module, leader: nn.Module) -> None:
    """Make a copy, such as a moving average, take its leader's layers when it is loaded after its leader."""
    if not any(isinstance(one, ReplacedCopy) for one in structures(copy)):
        ReplacedCopy(leader).attach(copy)


def _plain(name: Any, value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return isinstance(name, str) and all(type(one) in _PLAIN for one in values)


def _dense_sizes(module: nn.Module, path: str) -> LayerShape:
    """Return the sizes of a layer, or of what a replaced layer was."""
    if isinstance(module, Replaced):
        return module.was
    try:
        return linear_map(module).sizes
    except UnreplaceableError as error:
        raise RecordError(
            f"The state dict is of a network whose layer {path!r} was replaced, which this network's can't be: {error}."
        ) from error


def _check_fit(of: LayerShape, own: LayerShape, path: str, arriving: Arriving) -> None:
    """Raise a RecordError unless the recorded layer is this one, or what a cut has left of it."""
    if of.same(own):
        return
    fixed = ("kind", "bias", "kernel", "stride", "padding", "dilation", "padding_mode", "padding_idx")
    alike = all(getattr(of, name) == getattr(own, name) for name in fixed)
    thinner = alike and all(a <= b for a, b in zip((*of.shape, of.groups), (*own.shape, own.groups), strict=True))
    if not thinner or "cut" not in records(getattr(arriving.state_dict, "_metadata", None)):
        raise RecordError(
            f"The state dict is of a network whose layer {path!r}, of kind {of.kind} and shape {of.shape}, was "
            f"replaced; here it has the kind {own.kind} and the shape {own.shape}, or another stride or padding. Load "
            f"it into the class, with the arguments, that it was saved from."
        )


def _is_dense(module: Replaced, arriving: Arriving) -> bool:
    """Return whether a state dict has the tensors of the layer that a module was, and none of its parts."""
    names = {name[len(arriving.prefix) :] for name in arriving.state_dict if name.startswith(arriving.prefix)}
    return "weight" in names and not names & set(saved_tensors(module))
