"""What a file says of all tensors before the first of them: names, dtypes, shapes, and the state dict's metadata."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_compress.coding import records
from lightning_compress.coding.names import read_text, write_text
from lightning_compress.coding.patterns import DTYPES
from lightning_compress.coding.streams import Reader, Writer

_DIMENSIONS = 64
_TEXT_LIMIT = 1 << 20  # bytes of names or records that a file may hold, beside 16 times its own


@dataclass(frozen=True)
class Entry:
    """One tensor: its names (several for a tied one), dtype and shape."""

    names: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """All tensors in order, all names in order, and the metadata, or None where there is none."""

    entries: tuple[Entry, ...]
    names: tuple[str, ...]
    metadata: Mapping[str, Any] | None


def describe(state: Mapping[str, Any]) -> tuple[Header, list[Tensor]]:
    """Return the header of a state dict, and each tensor once, whatever the number of its names.

    Raises:
        ValueError: An entry is no tensor, not strided, without data, or of a dtype that a file can't hold.
    """
    groups: dict[tuple[object, ...], tuple[list[str], Tensor]] = {}
    for name, tensor in state.items():
        _check(name, tensor)
        same_memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        key = same_memory if tensor.numel() else (name,)
        groups.setdefault(key, ([], tensor.detach()))[0].append(name)
    entries = tuple(Entry(tuple(names), tensor.dtype, tuple(tensor.shape)) for names, tensor in groups.values())
    return Header(entries, tuple(state), getattr(state, "_metadata", None)), [tensor for _, tensor in groups.values()]


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name!r} is a {type(tensor).__name__}; a compressed file holds tensors only: leave it out.")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{name!r} has layout {tensor.layout} on {tensor.device}; expected strided, with data.")
    if tensor.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name!r} has dtype {tensor.dtype}; a compressed file holds {kinds}.")
    if "\0" in name:
        raise ValueError(f"{name!r} has a NUL character, which ends names in a compressed file: rename it.")


def write_header(writer: Writer, header: Header) -> None:
    """Write a header.

    Raises:
        ValueError: The metadata holds something other than plain values.
    """
    owner = {name: i for i, entry in enumerate(header.entries) for name in entry.names}
    firsts = {entry.names[0] for entry in header.entries}
    tied = [(place, name) for place, name in enumerate(header.names) if name not in firsts]
    writer.number(len(header.names))
    write_text(writer, "\0".join(header.names).encode())
    writer.number(len(tied))
    for place, name in tied:
        writer.number(place)
        writer.number(owner[name])
    dtype, recent = DTYPES[0], _Recent()
    for entry in header.entries:
        writer.uniform([int(entry.dtype != dtype)], 2)
        if entry.dtype != dtype:
            dtype = entry.dtype
            writer.uniform([DTYPES.index(dtype)], len(DTYPES))
        writer.number(len(entry.shape))
        for size in entry.shape:
            place = recent.place(size)
            writer.number(place)
            if not place:
                writer.number(size)
            recent.use(size)
    writer.uniform([int(header.metadata is not None)], 2)
    if header.metadata is not None:
        usual = _usual(header.names)
        unusual = {
            path: {key: _plain(value) for key, value in entry.items()}
            for path, entry in header.metadata.items()
            if entry != usual.get(path, {"version": 1})
        }
        write_text(writer, records.to_bytes(unusual, "The state dict's metadata") if unusual else b"")


def read_header(reader: Reader, file_bytes: int) -> Header:
    """Read what `write_header` wrote; all of it is checked but the size of the tensors."""
    limit = _TEXT_LIMIT + 16 * file_bytes
    count = reader.number()
    try:
        text = read_text(reader, limit).decode()
    except UnicodeDecodeError as error:
        reader.fail(f"its names are no text ({error})")
    names = text.split("\0") if count else []
    if len(names) != count or len(set(names)) != count or (text and not count):
        reader.fail(f"it has {len(set(names))} different names, and {count} are announced")
    owner = {}
    for _ in range(reader.number(count + 1)):
        place = reader.number(count)
        owner[place] = reader.number(count)
    firsts = [name for place, name in enumerate(names) if place not in owner]
    if any(tensor >= len(firsts) for tensor in owner.values()):
        reader.fail("a name belongs to a tensor that is not there")
    groups = [[name] for name in firsts]
    for place, tensor in owner.items():
        groups[tensor].append(names[place])
    dtype, recent, entries = DTYPES[0], _Recent(), []
    for group in groups:
        if reader.uniform(1, 2)[0]:
            dtype = DTYPES[int(reader.uniform(1, len(DTYPES))[0])]
        shape = []
        for _ in range(reader.number(_DIMENSIONS + 1)):
            place = reader.number(len(recent.sizes) + 1)
            shape.append(recent.sizes[-place] if place else reader.number(1 << 48))
            recent.use(shape[-1])
        entries.append(Entry(tuple(group), dtype, tuple(shape)))
    metadata = _read_metadata(reader, names, limit) if reader.uniform(1, 2)[0] else None
    return Header(tuple(entries), tuple(names), metadata)


def _read_metadata(reader: Reader, names: list[str], limit: int) -> Mapping[str, Any]:
    metadata: OrderedDict[str, Any] = OrderedDict(_usual(tuple(names)))
    data = read_text(reader, limit)
    if data:
        try:
            unusual = records.from_bytes(data)
        except ValueError as error:
            reader.fail(f"its metadata can't be read ({error})")
        if not isinstance(unusual, dict) or not all(
            isinstance(path, str) and isinstance(entry, dict) for path, entry in unusual.items()
        ):
            reader.fail("its metadata is no dict of dicts")
        metadata.update(unusual)
    return metadata


class _Recent:
    """Sizes in the order of their last use: one that was used before is told by its place, 1 for the last."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def place(self, size: int) -> int:
        return len(self.sizes) - self.sizes.index(size) if size in self.sizes else 0

    def use(self, size: int) -> None:
        if size in self.sizes:
            self.sizes.remove(size)
        self.sizes.append(size)


def _usual(names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """The metadata that torch gives the modules of these tensors: versions."""
    found: dict[str, dict[str, int]] = {"": {"version": 1}}
    for name in names:
        path, _, own = name.rpartition(".")
        parts = path.split(".") if path else []
        for end in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:end]), {"version": 1})
        if own == "num_batches_tracked":
            found[path] = {"version": 2}
    return found


def _plain(value: Any) -> Any:
    """A value with tuples in place of torch.Size, and dicts in place of their subclasses."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value)) if type(value) in (tuple, list) else tuple(map(_plain, value))
    return value
