"""Warns when a load ignores records: a user's own class has loaded the tensors of a network of another structure.

Importing this module changes `nn.Module.load_state_dict`, which is the one place that all loads go through.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from functools import wraps
from typing import Any, NamedTuple

from torch import nn

from lightning_compress.core.records import RecordError, UnknownRecordError, kind_class, records
from lightning_compress.core.structure import Structure, follows, structures

Records = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by kind, and by path of the module


class _Lost(NamedTuple):
    """A record of a module that exists, and that has no structure of this kind."""

    path: str
    kind: type[Structure]
    record: Mapping[str, Any]


def added_names(found: Records) -> tuple[str, ...]:
    """Return the prefixes of the names of tensors that recorded structures add to the user's class.

    Args:
        found: The records of a state dict.
    """
    every = [_Lost(path, kind_class(kind), record) for kind, given in found.items() for path, record in given.items()]
    return _prefixes(every)


def _prefixes(lost: list[_Lost]) -> tuple[str, ...]:
    return tuple(f"{one.path}.{name}" if one.path else name for one in lost for name in one.kind.own_keys(one.record))


def _lost(module: nn.Module, found: Records) -> list[_Lost]:
    layers = dict(module.named_modules()) if found else {}
    return [
        _Lost(path, kind_class(kind), record)
        for kind, given in found.items()
        for path, record in given.items()
        if path in layers and all(one.kind != kind for one in structures(layers[path]))
    ]


def _without(state_dict: Mapping[str, Any], prefixes: tuple[str, ...]) -> Mapping[str, Any]:
    """Return a state dict with its metadata, without the tensors whose names have one of these prefixes."""
    if not prefixes:
        return state_dict
    kept = OrderedDict((name, value) for name, value in state_dict.items() if not name.startswith(prefixes))
    kept._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return kept


def _change_loads() -> None:
    """Make every load of a state dict skip tensors that lost structures have added, and warn of lost records.

    In a user's own class, as in `load_from_checkpoint`, no other code of this package could do so.
    """
    load = nn.Module.load_state_dict

    @wraps(load)
    def load_and_look(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            found = records(getattr(state_dict, "_metadata", None))
        except (RecordError, UnknownRecordError) as error:
            result = load(module, state_dict, *args, **kwargs)
            warnings.warn(f"{type(module).__name__} has loaded tensors alone. {error}", stacklevel=2)
            return result
        lost = [] if follows(module) else _lost(module, found)
        try:
            result = load(module, _without(state_dict, _prefixes(lost)), *args, **kwargs)
        except RuntimeError as error:
            if remedies := [one.kind.when_refused(module) for one in lost if one.kind.renames]:
                raise RuntimeError(f"{error} {remedies[0]}") from error
            raise
        names: dict[type[Structure], list[str]] = {}
        for one in _lost(module, found):  # a load may have rebuilt some
            names.setdefault(one.kind, []).append(one.path)
        for kind, paths in names.items():
            if (message := kind.when_lost(module, paths)) is not None:
                warnings.warn(message, stacklevel=2)
        return result

    nn.Module.load_state_dict = load_and_look  # type: ignore[assignment,method-assign]


_change_loads()
