"""One plain file for a sparse network: of each tensor the cheaper of all its values and a bitmap plus its non-zeros.

    magic "LCSF" | version | header length | zlib(JSON header) | payload, tensor after tensor | CRC-32 of all before

The header lists in the payload's order: `names` (several for a tied tensor, which is stored once), `dtype`, `shape`,
`encoding` ("dense" or "bitmap") and the number of `nonzero` values. Numbers are little-endian; nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.core.files import replacing

_PREFIX = struct.Struct("<4sHI")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"LCSF"
_VERSION = 1
_MAX_HEADER = 1 << 28  # bytes of JSON: a crafted header must not inflate without end
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex64, torch.complex128),
    )
}
# values are moved as bit patterns, because masked operations miss some dtypes
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class CorruptFileError(ValueError):
    """A file is truncated, damaged or of another format; the message names the file and says what is wrong."""


def save_sparse(source: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> int:
    """Write a state dict, or a module's, into one file and return the file's size in bytes.

    With n entries of b bytes each, z of them not zero, a tensor takes min(n b, ceil(n / 8) + z b) bytes of payload.
    Nothing is lost, but that -0.0 comes back as 0.0 where the bitmap is cheaper. The file appears whole or not at all.

    Args:
        source: A module, or tensors by name: any device, any order in memory, 0-dimensional and empty ones included.
        path: The file, in an existing folder; an old one is replaced.

    Raises:
        ValueError: An entry is no tensor (a module's extra state), not strided, or of a dtype that the file can't hold.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "network.lcsf"
        >>> weight = torch.zeros(1000, 100)
        >>> weight[3, 5] = 2.5
        >>> size = save_sparse({"weight": weight}, path)
        >>> size == path.stat().st_size, size < 13_000
        (True, True)
        >>> torch.equal(load_sparse(path)["weight"], weight)
        True
    """
    stored = _stored_once(source.state_dict() if isinstance(source, nn.Module) else source)
    checksum = 0
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        for chunk in _chunks(stored):
            checksum = zlib.crc32(chunk, checksum)
            file.write(chunk)
        file.write(_CHECKSUM.pack(checksum))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_sparse` wrote: dense tensors by name, on the CPU; tied names share one tensor.

    Raises:
        CorruptFileError: The file is truncated, damaged, of another format or of an unknown version.
    """
    with Path(path).open("rb") as file:
        magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise CorruptFileError(f"{path} is no sparse network file: it starts with {magic!r}, not {_MAGIC!r}.")
        file.seek(0)
        reader = _Reader(path, file.read())
    _, version, header_length = _PREFIX.unpack(reader.take(_PREFIX.size))
    if version != _VERSION:
        raise reader.error(f"has format version {version}, and only {_VERSION} can be read")
    reader.verify_checksum()
    try:
        entries = _parse_header(reader.take(header_length))
    except (zlib.error, TypeError, ValueError) as error:
        raise reader.error(f"has a malformed header ({error})") from error
    state: dict[str, Tensor] = {}
    for entry in entries:
        state.update(dict.fromkeys(entry.names, _read_tensor(entry, reader)))
    reader.verify_end()
    return state


@dataclass(frozen=True)
class _Entry:
    names: list[str]
    dtype: str
    shape: list[int]
    encoding: str
    nonzero: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _stored_once(state: Mapping[str, Any]) -> list[tuple[list[str], Tensor]]:
    groups: dict[tuple[object, ...], tuple[list[str], Tensor]] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is a {type(tensor).__name__}; a sparse file holds tensors only: leave it out.")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name!r} has layout {tensor.layout} on {tensor.device}; expected strided, with data.")
        if _dtype_name(tensor) not in _DTYPES:
            raise ValueError(f"{name!r} has dtype {tensor.dtype}; a sparse file holds {', '.join(_DTYPES)}.")
        same_memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        groups.setdefault(same_memory, ([], tensor.detach()))[0].append(name)
    return list(groups.values())


def _chunks(stored: list[tuple[list[str], Tensor]]) -> Iterator[bytes | memoryview]:
    entries = [_entry(names, tensor) for names, tensor in stored]
    header = zlib.compress(json.dumps([asdict(entry) for entry in entries], separators=(",", ":")).encode(), 9)
    yield _PREFIX.pack(_MAGIC, _VERSION, len(header))
    yield header
    for entry, (_, tensor) in zip(entries, stored, strict=True):
        yield from _payload(entry, tensor)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _entry(names: list[str], tensor: Tensor) -> _Entry:
    nonzero = int(np.count_nonzero(_mask(tensor)))
    bitmap_bytes = _bitmap_bytes(tensor.numel()) + nonzero * tensor.itemsize
    encoding = "bitmap" if bitmap_bytes < tensor.numel() * tensor.itemsize else "dense"
    return _Entry(names, _dtype_name(tensor), list(tensor.shape), encoding, nonzero)


def _mask(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask: np.ndarray[Any, np.dtype[np.bool_]] = (tensor != 0).cpu().numpy()
    return mask


def _bitmap_bytes(numel: int) -> int:
    return -(-numel // 8)


def _payload(entry: _Entry, tensor: Tensor) -> Iterator[memoryview]:
    values = tensor.cpu().reshape(-1).contiguous()  # reshape leaves an expanded vector expanded
    bits = values.view(_BITS[tensor.itemsize])
    if entry.encoding == "bitmap":
        mask = _mask(values)
        yield np.packbits(mask).data
        bits = bits[torch.from_numpy(mask)]
    yield bits.numpy().data


class _Reader:
    """Takes a file's bytes one piece after the other and refuses to go past their end."""

    def __init__(self, path: str | os.PathLike[str], data: bytes) -> None:
        self._path = path
        self._data = memoryview(data)
        self._position = 0

    def error(self, problem: str) -> CorruptFileError:
        return CorruptFileError(f"{self._path} {problem}.")

    def take(self, count: int) -> memoryview:
        end = self._position + count
        if end > len(self._data):
            raise self.error(f"is truncated: {end} bytes expected, {len(self._data)} found")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def verify_checksum(self) -> None:
        content, stored = self._data[: -_CHECKSUM.size], self._data[-_CHECKSUM.size :]
        if zlib.crc32(content) != _CHECKSUM.unpack(stored)[0]:
            raise self.error("is truncated or damaged: its checksum does not fit its content")
        self._data = content

    def verify_end(self) -> None:
        if self._position != len(self._data):
            raise self.error(f"has {len(self._data) - self._position} bytes more than its header lists")


def _parse_header(blob: memoryview) -> list[_Entry]:
    entries = [_Entry(**item) for item in json.loads(zlib.decompressobj().decompress(blob, _MAX_HEADER))]
    for entry in entries:
        if (
            entry.dtype not in _DTYPES
            or entry.encoding not in ("dense", "bitmap")
            or not all(isinstance(size, int) and size >= 0 for size in (*entry.shape, entry.nonzero))
        ):
            raise ValueError(f"unknown entry {entry}")
    return entries


def _read_tensor(entry: _Entry, reader: _Reader) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    if entry.encoding == "dense":
        return _values(reader, entry.numel, dtype).reshape(entry.shape)
    bitmap = np.frombuffer(reader.take(_bitmap_bytes(entry.numel)), np.uint8)
    mask = np.unpackbits(bitmap, count=entry.numel).view(np.bool_)
    if np.count_nonzero(mask) != entry.nonzero:
        raise reader.error(f"lists {entry.nonzero} values for {entry.names}, but its bitmap has another number")
    values = _values(reader, entry.nonzero, dtype)
    bits = torch.zeros(entry.numel, dtype=_BITS[dtype.itemsize])
    bits.masked_scatter_(torch.from_numpy(mask), values.view(bits.dtype))
    return bits.view(dtype).reshape(entry.shape)


def _values(reader: _Reader, count: int, dtype: torch.dtype) -> Tensor:
    raw = reader.take(count * dtype.itemsize)
    values = torch.empty(count, dtype=dtype)
    values.view(torch.uint8).numpy()[:] = raw
    return values
