"""Check the record of a cut before it is followed, because it comes from a file that may be corrupt or crafted.

A cut makes numbers that count channels smaller, and leaves fewer positions of buffers and smaller sizes of tensors. A
record may say nothing else. All of it is checked before the network changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from torch import nn

from lightning_compress.channels.attributes import MAY_CHANGE
from lightning_compress.channels.reshapes import MOST, Pattern, is_reshape
from lightning_compress.core.records import RecordError, shown

KINDS = ("numbers", "buffers", "dense_shapes", "dense_numbers")


def check_structure(record: Any) -> None:
    """Refuse a record whose parts have other types than those that a cut writes.

    Raises:
        RecordError: A part has another type.
    """
    if not isinstance(record, Mapping) or set(record) != set(KINDS):
        found = ", ".join(map(repr, record)) if isinstance(record, Mapping) else f"none: it is {shown(record)}"
        _fail(f"has the entries {found}, and needs {', '.join(map(repr, KINDS))}")
    for kind in KINDS:
        entries = record[kind]
        if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
            _fail(f"has {shown(entries)} as {kind!r}, and needs a dict by name")
        for name, value in entries.items():
            if kind == "dense_shapes":
                if not _is_sizes(value, least=0):
                    _fail(f"says that {name!r} had the shape {shown(value)}, which is no tuple of sizes")
            elif not isinstance(value, Mapping):
                _fail(f"has {shown(value)} as {kind!r} of {name!r}, and needs a dict")
            elif kind == "buffers":
                for dim, keep in value.items():
                    if not _is_int(dim, 0) or not _is_ascending(keep):
                        _fail(f"keeps {shown(keep)} of dimension {shown(dim)} of {name!r}, which are no positions")
            else:
                if sum(map(is_reshape, map(str, value))) > MOST:
                    _fail(f"sets more than {MOST} reshapes of {name!r}, which no cut leaves behind")
                for attribute, number in value.items():
                    if attribute not in MAY_CHANGE and not is_reshape(str(attribute)):
                        _fail(f"sets {shown(attribute)} of {name!r}, which no cut changes")
                    if not _is_int(number, 1) and not (_is_sizes(number, least=1) and len(number)):
                        _fail(f"sets {attribute!r} of {name!r} to {shown(number)}, and a cut leaves a number above 0")


def check_record(
    record: Mapping[str, Any],
    model: nn.Module,
    incoming: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    dense: Mapping[str, Mapping[str, Any]] | None,
) -> None:
    """Refuse a record that names what the network lacks, or values that no cut leaves.

    Args:
        record: The record, whose structure has been checked.
        model: The network that is about to follow the record.
        incoming: Shapes of the tensors that come with the record.
        shapes: Shapes of the model's tensors.
        dense: Numbers of the dense network by module; None if they are not known.

    Raises:
        RecordError: The record is refused; nothing changes.
    """
    for name, before in record["dense_shapes"].items():
        if name not in shapes:
            _fail(f"says that {name!r} was cut, which {type(model).__name__} has not")
        if name not in incoming:
            _fail(f"says that {name!r} was cut, which is not among the tensors that come with it")
        after = incoming[name]
        if len(after) != len(before) or not all(b == a == 0 or 0 < a <= b for a, b in zip(after, before, strict=True)):
            _fail(
                f"says that {name!r} had the shape {tuple(before)}, and it comes with {after}: no cut of its channels "
                f"leads from one to the other"
            )
    modules = dict(model.named_modules(remove_duplicate=False))
    for kind in ("numbers", "dense_numbers"):
        for path, values in record[kind].items():
            for name, value in values.items():
                noted = Pattern.of(name).dense if is_reshape(name) else None  # the module has no such attribute yet
                have = vars(modules[path]).get(name, noted) if path in modules else None
                if have is None:
                    _fail(f"sets {name!r} of {path!r}, and {type(model).__name__} has no such number")
                if not (_is_int(have, 1) and _is_int(value, 1)) and not (
                    _is_sizes(have, least=1) and isinstance(value, Sequence) and len(have) == len(value)
                ):
                    _fail(f"sets {name!r} of {path!r} to {shown(value)} where {shown(have)} stands")
                known = (dense or {}).get(path, {}).get(name, noted)
                most = record["dense_numbers"].get(path, {}).get(name, known) if kind == "numbers" else known
                if kind == "dense_numbers" and dense is not None and known is not None and not _same(value, known):
                    raise RecordError(
                        f"The state dict is of a network that was cut, whose {path}.{name} was {shown(value)} before, "
                        f"and that of this network is {shown(known)}. Load it into the class, with the arguments, that "
                        f"it was saved from."
                    )
                if most is not None and not _within(value, most):
                    _fail(f"sets {name!r} of {path!r} to {shown(value)}, more than the {shown(most)} before the cut")
            if kind == "numbers":
                _check_divisible(path, values, incoming)
    for path, values in record["dense_numbers"].items():
        for name in values:  # a module has an attribute for a reshape only after the cut
            if name not in record["numbers"].get(path, {}) and not is_reshape(name):
                _fail(f"says what {name!r} of {path!r} was before the cut, and not what it is")
    hidden = {
        f"{path}.{name}".lstrip(".")
        for path, module in modules.items()
        for name in module._non_persistent_buffers_set
        if module._buffers[name] is not None
    }
    for name in record["buffers"]:
        if name not in hidden:
            _fail(f"keeps positions of {name!r}, and {type(model).__name__} has no such buffer outside the state dict")


def _check_divisible(path: str, values: Mapping[str, Any], incoming: Mapping[str, tuple[int, ...]]) -> None:
    weight = incoming.get(f"{path}.weight".lstrip("."))
    for name in ("groups", "num_groups"):
        if weight and isinstance(values.get(name), int) and weight[0] % values[name]:
            _fail(f"sets {name!r} of {path!r} to {values[name]}, which does not divide its {weight[0]} channels")


def _same(one: Any, other: Any) -> bool:
    return tuple(one) == tuple(other) if isinstance(other, Sequence) else bool(one == other)


def _within(value: Any, most: Any) -> bool:
    if isinstance(value, Sequence) != isinstance(most, Sequence):
        return False
    if isinstance(value, Sequence):
        return len(value) == len(most) and all(a <= b for a, b in zip(value, most, strict=True))
    return bool(value <= most)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 48


def _is_sizes(value: Any, *, least: int) -> bool:
    return isinstance(value, tuple | list) and all(_is_int(one, least) for one in value)


def _is_ascending(value: Any) -> bool:
    return _is_sizes(value, least=0) and len(value) > 0 and all(a < b for a, b in pairwise(value))


def _fail(problem: str) -> NoReturn:
    raise RecordError(f"The record of a cut {problem}.")
