"""Writes and reads the header: names, dtypes and shapes of all tensors, and the state dict's metadata."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from lightning_compress.channels.load import is_extra
from lightning_compress.coding import plain_values
from lightning_compress.coding.names import memory_of_names, read_text, write_text
from lightning_compress.coding.patterns import DTYPES
from lightning_compress.coding.streams import Reader, Writer

_DIMENSIONS = 64  # most dimensions of a tensor
_SIZE = 1 << 48  # the size of a dimension is smaller; torch allows larger sizes if another is zero
_ALLOWANCE = 1 << 24  # bytes of memory that names and records may take in addition to 16 times the file's size
_EXTRAS = "lightning_compress.extra_state"  # a key in the root module's metadata
_ASSIGN = "assign_to_params_buffers"  # torch leaves this key in metadata; with it a load would replace parameters


@dataclass(frozen=True)
class Entry:
    """The names of one tensor (several if it is tied), its dtype and its shape."""

    names: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The bytes of the tensor in memory."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def possible(self) -> bool:
        """Whether a file may have a tensor of this shape."""
        small = len(self.shape) <= _DIMENSIONS and all(size < _SIZE for size in self.shape)
        return small and prod(max(size, 1) for size in self.shape) * self.dtype.itemsize < 1 << 63


@dataclass(frozen=True)
class Header:
    """The content of a header.

    Attributes:
        entries: All tensors, in order.
        names: All names, in the order of the state dict.
        metadata: The metadata of the state dict, or None.
        extras: Extra states that are not tensors, by name.
    """

    entries: tuple[Entry, ...]
    names: tuple[str, ...]
    metadata: Mapping[str, Any] | None
    extras: Mapping[str, Any] = field(default_factory=dict)


def memory_limit(file_bytes: int) -> int:
    """Return how many bytes of memory the names and records of a file of this size may take."""
    return _ALLOWANCE + 16 * file_bytes


def write_header(writer: Writer, header: Header) -> int:
    """Write a header, and return how many bytes of memory a reader needs for its names and plain values.

    Raises:
        ValueError: The metadata or an extra state hold something other than plain values, or a reader would refuse the
            shape of a tensor.
    """
    if unreadable := [entry for entry in header.entries if not entry.possible]:
        raise ValueError(
            f"{unreadable[0].names[0]!r} has the shape {unreadable[0].shape}; a tensor of a compressed file has at "
            f"most {_DIMENSIONS} dimensions, each below {_SIZE}, and fewer than 2^63 bytes. Reshape it before saving."
        )
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
            if place:
                recent.taken(place)
            else:
                writer.number(size)
            recent.add(size)
    unusual = _unusual(header)
    writer.uniform([int(unusual is not None)], 2)
    if unusual is not None:
        write_text(writer, plain_values.to_bytes(unusual, "The state dict's metadata") if unusual else b"")
    return memory_of_names(header.names) + (plain_values.memory(unusual) if unusual else 0)


def _unusual(header: Header) -> dict[str, Any] | None:
    """Return the metadata that can't be derived from the names; None if the state dict has neither these nor extras."""
    if header.metadata is None and not header.extras:
        return None
    usual = _usual(header.names)
    metadata = {
        path: {key: value for key, value in entry.items() if key != _ASSIGN}
        for path, entry in ({"": {}} if header.metadata is None else header.metadata).items()
    }
    for path, entry in metadata.items():
        if not isinstance(entry.get("version"), int | None):
            raise ValueError(
                f"The state dict's metadata of {path!r} have the version {entry['version']!r}; it must be an integer."
            )
    for name, value in header.extras.items():
        plain_values.to_bytes(value, f"{name!r}, an extra state,")
    if header.extras:
        metadata[""] = metadata.get("", {}) | {_EXTRAS: header.extras}
    return {path: entry for path, entry in metadata.items() if entry != usual.get(path, {"version": 1})}


def read_header(reader: Reader, file_bytes: int) -> Header:
    """Read a header that `write_header` wrote, and check everything except the total size of the tensors."""
    limit = memory_limit(file_bytes)
    count = reader.number()
    if count * memory_of_names([""]) > limit:
        reader.fail(f"it announces {count} names, more than the {limit // memory_of_names(['']):,} that it may have")
    try:
        text = read_text(reader, limit).decode()
    except UnicodeDecodeError as error:
        reader.fail(f"its names are not text ({error})")
    found = text.count("\0") + 1 if count else 0
    if found != count or (text and not count):
        reader.fail(f"it has {found} names, but announces {count}")
    names = text.split("\0") if count else []
    if len(set(names)) != count:
        reader.fail(f"it has {len(set(names))} different names, but announces {count}")
    limit -= memory_of_names(names)
    if limit < 0:
        reader.fail(f"its names are longer, or have more parts, than a file of {file_bytes} bytes may have")
    owner = {}
    for _ in range(reader.number(count + 1)):
        place = reader.number(count)
        owner[place] = reader.number(count)
    firsts = [name for place, name in enumerate(names) if place not in owner]
    if any(tensor >= len(firsts) for tensor in owner.values()):
        reader.fail("a name belongs to a tensor that it does not have")
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
            shape.append(recent.taken(place) if place else reader.number(_SIZE))
            if not place and shape[-1] in recent.known:
                reader.fail(f"a size of {shape[-1]} is written out, though it was used before")
            recent.add(shape[-1])
        entries.append(Entry(tuple(group), dtype, tuple(shape)))
        if not entries[-1].possible:
            reader.fail(f"a tensor has the shape {tuple(shape[:8])}, for which no machine has memory")
    if not reader.uniform(1, 2)[0]:
        return Header(tuple(entries), tuple(names), None)
    metadata, extras = _read_metadata(reader, names, limit)
    return Header(tuple(entries), tuple(names), metadata, extras)


def _read_metadata(reader: Reader, names: list[str], limit: int) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    metadata: OrderedDict[str, Any] = OrderedDict(_usual(names))
    data = read_text(reader, limit)
    if not data:
        return metadata, {}
    try:
        unusual = plain_values.from_bytes(data, limit)
    except ValueError as error:
        reader.fail(f"its metadata can't be read ({error})")
    if not isinstance(unusual, dict) or not all(
        isinstance(path, str) and isinstance(entry, dict) and isinstance(entry.get("version"), int | None)
        for path, entry in unusual.items()
    ):
        reader.fail("its metadata are not a dict of dicts with integer versions")
    for entry in unusual.values():
        entry.pop(_ASSIGN, None)
    root = unusual.get("", {})
    extras = root.pop(_EXTRAS, {})
    if not isinstance(extras, dict) or not all(isinstance(name, str) and is_extra(name) for name in extras):
        reader.fail("its extra states are not a dict by name")
    if set(extras) & set(names):
        reader.fail("an extra state has the name of a tensor")
    if extras and not root:  # the state dict had no metadata
        return None, extras
    metadata.update(unusual)
    return metadata, extras


class _Recent:
    """The sizes of dimensions so far, in the order of their last use; a known size is written as its place.

    Place 1 is the size that was used last; place 0 stands for a new size.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.known: set[int] = set()

    def place(self, size: int) -> int:
        return len(self.sizes) - self.sizes.index(size) if size in self.known else 0

    def taken(self, place: int) -> int:
        return self.sizes.pop(-place)

    def add(self, size: int) -> None:
        self.sizes.append(size)
        self.known.add(size)


def _usual(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the metadata that torch writes for the modules of these tensors: only versions."""
    found: dict[str, dict[str, int]] = {"": {"version": 1}}
    for name in names:
        path, _, own = name.rpartition(".")
        parts = path.split(".") if path else []
        for end in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:end]), {"version": 1})
        if own == "num_batches_tracked":
            found[path] = {"version": 2}
    return found
