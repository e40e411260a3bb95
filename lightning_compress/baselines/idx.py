"""Reads the file formats of MNIST and CIFAR-10."""

from __future__ import annotations

import gzip
import math
import tarfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

IDX_UINT8 = 0x08
CIFAR_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes


def read_idx(path: str | Path) -> Tensor:
    """Return the uint8 tensor of an IDX file; a file whose name ends in .gz is unpacked.

    An IDX file consists of two zero bytes, the type (0x08: uint8), the number of dimensions, one big-endian 32-bit size
    per dimension, and the values in row-major order.

    Raises:
        ValueError: The file is not a complete IDX file of uint8 values; the message names it.
    """
    path = Path(path)
    content = _unpack(path) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != bytes([0, 0, IDX_UINT8]):
        raise ValueError(
            f"{path} is not an IDX file of uint8 values: it must begin with the bytes 00 00 08, but begins with"
            f" {content[:3].hex(' ') or 'nothing'}. Remove it, and download it again."
        )
    header = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path} is truncated or corrupt: its header announces {'x'.join(map(str, shape))} values,"
            f" {header + math.prod(shape):,} bytes in all, but it has {len(content):,}. Remove it, and download it"
            " again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def parse_cifar10(content: bytes, *, name: str) -> tuple[Tensor, Tensor]:
    """Return the images (N, 3, 32, 32) and labels (N,) of one file of CIFAR-10's binary version, both as uint8.

    Args:
        content: The content of the file: records of 3,073 bytes, with the label and the red, green and blue planes.
        name: The name of the file, for messages.

    Raises:
        ValueError: The length is not a positive multiple of 3,073, or a label is above 9; the message names the file.
    """
    if not content or len(content) % CIFAR_RECORD:
        raise ValueError(
            f"{name} is truncated or corrupt: its length must be a multiple of the {CIFAR_RECORD:,} bytes of a CIFAR-10"
            f" record, and is {len(content):,} bytes. Remove the file or its archive, and download it again."
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, CIFAR_RECORD)
    labels = records[:, 0].clone()
    if (largest := int(labels.max())) > 9:
        raise ValueError(
            f"{name} is corrupt: CIFAR-10's labels are from 0 to 9, and it has a {largest}. Remove the file or its"
            " archive, and download it again."
        )
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def read_tar_members(path: Path, names: list[str]) -> dict[str, bytes]:
    """Return the content of the files with the given base names in a .tar.gz archive, in one pass.

    Raises:
        ValueError: The archive is corrupt or lacks one of the files; the message names the archive.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = Path(member.name).name
                if name in names and (file := archive.extractfile(member)) is not None:
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}. Remove it, and download it again.") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} does not contain {', '.join(missing)}. Remove it, and download it again.")
    return found


def _unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}. Remove it, and download it again.") from error
