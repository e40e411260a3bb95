"""The container of a compressed file: magic bytes, version, raw bytes, stream and checksum.

    89 4C 43       "LC" after a byte that no text starts with
    02             version of the format; version 1 had the same container, with several layouts of the content; 03 if
                   a tensor is stored as the mask of weights from a seed (`seeds.py`), and else the same as 02
    varint         4 * (number of raw bytes) + coder; coder: 0 ans, 1 huffman, 2 none
    raw bytes
    stream         up to the checksum
    4 bytes        CRC-32 of all bytes before it, lowest byte first

The raw bytes and the stream are read side by side from their beginnings: first the header (`header.py`), then each
tensor (`encodings/tensor.py`).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from lightning_compress.coding.ans import AnsReader, AnsWriter
from lightning_compress.coding.bits import BitReader, BitWriter, HuffmanReader, HuffmanWriter
from lightning_compress.coding.errors import CorruptFileError
from lightning_compress.coding.plain_values import read_varint, varint
from lightning_compress.coding.streams import Reader, Writer
from lightning_compress.core.files import replacing

Coder = Literal["ans", "huffman", "none"]
MAGIC = b"\x89LC"
_VERSION = 2  # increase it whenever the meaning of the bytes changes; tests/coding/test_format.py has files of each
_SEEDED = 3  # such a file has the layout of version 2, whose readers would take masks for values
_UNSURE = 1  # the layout of the content changed while files had this version
_CHECKSUM = 4  # bytes
_LEAST = len(MAGIC) + 1 + 1 + _CHECKSUM
_CODERS: dict[str, tuple[type[Writer], type[Reader]]] = {
    "ans": (AnsWriter, AnsReader),
    "huffman": (HuffmanWriter, HuffmanReader),
    "none": (BitWriter, BitReader),
}


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins with the magic bytes of a compressed file.

    Example:
        >>> is_compressed(__file__)
        False
    """
    with Path(path).open("rb") as file:
        return MAGIC.startswith(file.read(len(MAGIC)))  # a file that ends within them was truncated


def make_writer(coder: Coder) -> Writer:
    """Return an empty writer.

    Raises:
        ValueError: `coder` is unknown.
    """
    if coder not in _CODERS:
        raise ValueError(f"coder={coder!r} is unknown; expected one of {', '.join(map(repr, _CODERS))}.")
    return _CODERS[coder][0]()


def write_file(
    path: str | os.PathLike[str],
    writer: Writer,
    coder: Coder,
    *,
    seeded: bool = False,
    check: Callable[[int], None] = lambda size: None,
) -> int:
    """Write the content of a writer to a file, and return the file's size; an error leaves the old file unchanged.

    Args:
        path: The file.
        writer: The writer that collected the content.
        coder: The writer's coder.
        seeded: Whether a tensor is stored as the mask of weights from a seed.
        check: A function that gets the file's size before the file is put in its place, and may raise.
    """
    prefix = (
        MAGIC + bytes([_SEEDED if seeded else _VERSION]) + varint(4 * writer.raw_bytes + list(_CODERS).index(coder))
    )
    checksum = 0
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        for piece in _pieces(writer, prefix):
            checksum = zlib.crc32(piece, checksum)
            file.write(piece)
        file.write(checksum.to_bytes(_CHECKSUM, "little"))
        check(file.tell())
        return file.tell()


def _pieces(writer: Writer, prefix: bytes) -> Iterator[bytes]:
    yield prefix
    yield from writer.raw_pieces()
    yield writer.finish()


def has_seeds(data: memoryview) -> bool:
    """Return whether a file stores tensors as the masks of weights from a seed."""
    return data[len(MAGIC)] == _SEEDED


def explained(error: BaseException, data: memoryview) -> str:
    """Describe what is wrong with a file; a file of version 1 may be intact, but have another layout."""
    problem = str(error) or "its tensors do not fit into memory"
    whole = len(data) >= _LEAST and zlib.crc32(data[:-_CHECKSUM]) == int.from_bytes(data[-_CHECKSUM:], "little")
    if not whole or data[len(MAGIC)] != _UNSURE or "max_bytes" in problem:
        return problem
    return (
        f"it has version {_UNSURE} of the format, whose layout changed while it kept that number; it is damaged, or "
        f"has an older layout ({problem}). Load it with the version of lightning_compress that wrote it, and save it "
        f"again with this one"
    )


def open_reader(data: memoryview) -> tuple[Reader, str]:
    """Return the reader of a file's content, and the name of its coder.

    Raises:
        CorruptFileError: The file is truncated, damaged, of another version, or not a compressed network.
    """
    if len(data) < _LEAST:
        raise CorruptFileError(f"it has {len(data)} bytes, fewer than the {_LEAST} of an empty network")
    if data[: len(MAGIC)] != MAGIC:
        raise CorruptFileError(f"it starts with {bytes(data[: len(MAGIC)])!r}, not {MAGIC!r}")
    if data[len(MAGIC)] not in (_UNSURE, _VERSION, _SEEDED):
        raise CorruptFileError(
            f"it has version {data[len(MAGIC)]} of the format, and only {_UNSURE}, {_VERSION} and {_SEEDED} can "
            f"be read. Load it "
            f"with the version of lightning_compress that wrote it"
        )
    content = data[:-_CHECKSUM]
    if zlib.crc32(content) != int.from_bytes(data[-_CHECKSUM:], "little"):
        raise CorruptFileError("it is truncated or damaged: its checksum does not match its content")
    try:
        number, start = read_varint(content, len(MAGIC) + 1)
    except ValueError as error:
        raise CorruptFileError(str(error)) from error
    raw, coder = divmod(number, 4)
    if coder >= len(_CODERS) or start + raw > len(content):
        raise CorruptFileError(
            f"it announces {raw} raw bytes and coder {coder}; it has {len(content) - start} bytes, and coders are "
            f"0 to {len(_CODERS) - 1}"
        )
    name = list(_CODERS)[coder]
    return _CODERS[name][1](content[start + raw :], content[start : start + raw]), name
