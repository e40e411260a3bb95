"""Tensors whose values are a mask times weights from a seed: a file stores the mask alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_compress.coding.header import Entry, Header
from lightning_compress.core.records import KEY
from lightning_compress.core.seeded import Seeded

_KIND, _FIELD = "seeded", "origins"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch does not multiply those of 8 bits


def without_weights(header: Header, tensors: Sequence[Tensor]) -> tuple[Header, list[Tensor], set[str]]:
    """Replace tensors by their masks of -1, 0 and 1 where the seeds of the metadata return the same values bit for bit.

    The metadata of the returned header have no seeds of other tensors, such as those that were trained afterwards.

    Args:
        header: The header of a file.
        tensors: Its tensors.

    Returns:
        The header, the tensors, and the first names of those that are masks.
    """
    origins = _origins(header.metadata)
    found, masks = list(tensors), set()
    for place, entry in enumerate(header.entries):
        origin = _origin_of(entry, origins)
        ratio = None if origin is None or entry.dtype not in _DTYPES else origin.ratio(found[place])
        if ratio is not None:
            found[place] = ratio
            masks.add(entry.names[0])
    kept = {name for entry in header.entries if entry.names[0] in masks for name in entry.names}
    return replace(header, metadata=_only(header.metadata, kept)), found, masks


def names_seeds(header: Header) -> bool:
    """Return whether the metadata have a seed of any tensor."""
    return bool(_origins(header.metadata))


def with_weights(header: Header, entry: Entry, mask: Tensor) -> Tensor:
    """Return the values of a tensor that is stored as its mask; any other tensor is returned as it is.

    Raises:
        ValueError, TypeError: The record of the seed has another form than this package writes.
    """
    origin = _origin_of(entry, _origins(header.metadata)) if entry.dtype in _DTYPES else None
    return mask if origin is None else origin.masked(mask)


def _origin_of(entry: Entry, origins: Mapping[str, Any]) -> Seeded | None:
    record = next((origins[name] for name in entry.names if name in origins), None)
    return None if record is None else Seeded.of(record)


def _origins(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the records of seeds, by name of the tensor."""
    return {
        f"{path}.{name}" if path else name: record
        for path, entry in (metadata or {}).items()
        for name, record in _records_in(entry).items()
    }


def _records_in(entry: Any) -> Mapping[str, Any]:
    kinds = entry.get(KEY) if isinstance(entry, Mapping) else None
    record = kinds.get(_KIND) if isinstance(kinds, Mapping) else None
    found = record.get(_FIELD) if isinstance(record, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _only(metadata: Mapping[str, Any] | None, names: set[str]) -> Mapping[str, Any] | None:
    """Return metadata in which no other tensors than these have seeds."""
    if metadata is None:
        return None
    changed = dict(metadata)
    for path, entry in metadata.items():
        if not (found := _records_in(entry)):
            continue
        left = {name: record for name, record in found.items() if (f"{path}.{name}" if path else name) in names}
        kinds = dict(entry[KEY])
        if left:
            kinds[_KIND] = kinds[_KIND] | {_FIELD: left}
        else:
            del kinds[_KIND]
        changed[path] = {key: value for key, value in entry.items() if key != KEY} | ({KEY: kinds} if kinds else {})
    return changed
