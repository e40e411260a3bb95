"""Saves a network in one small file, and loads it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_compress.coding.checkpoints import adopt, read_state
from lightning_compress.coding.container import (
    Coder,
    explained,
    has_seeds,
    is_compressed,
    make_writer,
    open_reader,
    write_file,
)
from lightning_compress.coding.encodings.tensor import read_tensor, write_tensor
from lightning_compress.coding.errors import CorruptFileError
from lightning_compress.coding.header import Header, memory_limit, read_header, write_header
from lightning_compress.coding.seeds import names_seeds, with_weights, without_weights
from lightning_compress.coding.size import CompressedSize, TensorSize
from lightning_compress.coding.state import describe
from lightning_compress.core.records import RecordError


def save_compressed(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], *, coder: Coder = "ans", half: bool = False
) -> CompressedSize:
    """Write a network's state dict into one file, with the encoding that takes the fewest bytes for each tensor.

    Encodings are chosen from the values alone: a coded map of the zeros; a codebook of k values with coded indices
    (n H + k b bits at entropy H); small integers times a scale per tensor or channel (signs, grids of a few bits);
    floats that float16 represents exactly; integers of a few bits; else raw bytes. Of weights that a supermask chose
    from a seed the file has the seed and the mask, as long as they are what the seed yields. All values are restored
    bit for bit, except that -0.0 becomes 0.0. If saving fails, an existing file stays unchanged.

    Args:
        model: A module, or tensors by name, on any device and with any strides. A tied tensor is stored once. The
            metadata of a state dict, which a cut network needs to be rebuilt, are saved as well.
        path: The file, in an existing folder; an existing file is replaced.
        coder: "ans" codes at the entropy; "huffman" uses Deep Compression's relative indices and Huffman codes, with
            whole bits per symbol; "none" uses fixed widths.
        half: Whether float32 and float64 values and codebooks are rounded to float16; they are loaded in their dtype.

    Returns:
        The bytes of each tensor and of the file; `print` shows them as a table.

    Raises:
        ValueError: `coder` is unknown, or a file can't hold the state dict: an entry is not a tensor or has an unknown
            dtype or layout, or the metadata hold something other than plain values.

    Paper:
        Han et al., Deep Compression (1510.00149).

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "network.lcz"
        >>> layer = nn.Linear(300, 100)
        >>> _ = layer.weight.data.mul_(torch.rand(100, 300) < 0.1).sign_()  # 10 % left, as signs
        >>> size = save_compressed(layer, path)
        >>> size.bytes < 3000, size.dense_bytes
        (True, 120400)
        >>> torch.equal(load_compressed(path)["weight"], layer.weight)
        True
    """
    writer = make_writer(coder)
    header, tensors, masks = without_weights(*describe(model.state_dict() if isinstance(model, nn.Module) else model))
    memory = write_header(writer, header)
    sizes = []
    for entry, tensor in zip(header.entries, tensors, strict=True):
        before = writer.bits
        encoding = write_tensor(writer, tensor, half=half)
        if entry.names[0] in masks:
            encoding = replace(encoding, name=f"weights from a seed, {encoding.name}")
        sizes.append(TensorSize.of(entry, encoding, writer.bits - before))

    def check(size: int) -> None:
        if memory > memory_limit(size):
            raise ValueError(
                f"The names of {len(header.names):,} tensors and the state dict's metadata take {memory:,} bytes of "
                f"memory. From a file of {size:,} bytes load_compressed reads at most {memory_limit(size):,}, so that "
                f"no crafted file can exhaust the memory. Use shorter names, or stack small tensors."
            )

    return CompressedSize(write_file(path, writer, coder, seeded=bool(masks), check=check), coder, tuple(sizes))


def load_compressed(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, max_bytes: int | None = None
) -> Any:
    """Load a compressed network: a file of `save_compressed`, a Lightning checkpoint, or a state dict.

    Args:
        path: The file. Its first bytes decide which of the three it is.
        model: A network of the user's own class; dense, even if the saved network was cut. It gets the file's shapes
            and weights.
        max_bytes: How much memory the tensors of a compressed file may take. None: 1 GiB, or 256 times the size of the
            file if that is more.

    Returns:
        The model; without one, the state dict: dense tensors on the CPU, where tied names share one tensor.

    Raises:
        FileNotFoundError: The file does not exist.
        CorruptFileError: The compressed file is truncated, damaged, crafted, of an unknown version, or too large.
        UnknownRecordError: A later version saved the network, with a change that this version can't rebuild.
        ValueError: The file holds no tensors, or those of another network; the model is unchanged.

    Example:
        >>> import tempfile, torch
        >>> from lightning_compress.channels.cut import cut
        >>> def make():
        ...     return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> path = Path(tempfile.mkdtemp()) / "thin.lcz"
        >>> _ = save_compressed(cut(make(), torch.zeros(2, 3), keep={"0": [0, 3, 5]}), path)
        >>> load_compressed(path, make())[0]
        Linear(in_features=3, out_features=3, bias=True)
    """
    if Path(path).is_file() and is_compressed(path):
        state = read_compressed(path, max_bytes=max_bytes).state
    else:
        state = read_state(path)
    if model is None:
        return state
    try:
        return adopt(model, state, path)
    except RecordError as error:
        raise CorruptFileError(f"{path} is corrupt: {error}") from error


@dataclass(frozen=True)
class CompressedFile:
    """The content of a compressed file: the state dict, and the size of each tensor."""

    state: dict[str, Tensor]
    size: CompressedSize


def read_compressed(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> CompressedFile:
    """Read a file of `save_compressed`.

    Args:
        path: The file.
        max_bytes: How much memory its tensors may take; None: `default_limit` of the file's size.

    Raises:
        FileNotFoundError: The file does not exist.
        CorruptFileError: The file is truncated, damaged, crafted, of an unknown version, too large, or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path} (looked for in {Path(path).absolute().parent}).")
    data = np.fromfile(path, np.uint8).data  # numpy's memory is cheaper than that of read_bytes()
    try:
        return _read(data, default_limit(len(data)) if max_bytes is None else max_bytes)
    except (CorruptFileError, MemoryError) as error:
        raise CorruptFileError(f"{path} is corrupt: {explained(error, data)}.") from None


def _read(data: memoryview, limit: int) -> CompressedFile:
    reader, coder = open_reader(data)
    header = read_header(reader, len(data))
    announced = sum(entry.bytes for entry in header.entries)
    if announced > limit:
        reader.fail(
            f"its tensors take {announced} bytes, more than the {limit} that max_bytes allows for a file of "
            f"{len(data)} bytes. If you trust its source, pass max_bytes={announced}"
        )
    seeded = has_seeds(data)
    if seeded and not names_seeds(header):
        reader.fail("its version of the format is for weights from seeds, and it has no seeds")
    tensors: dict[str, Tensor] = {}
    sizes = []
    for entry in header.entries:
        before = reader.bits + reader.raw_bits
        tensor, encoding = read_tensor(reader, entry.dtype, entry.shape)
        sizes.append(TensorSize.of(entry, encoding, reader.bits + reader.raw_bits - before))
        if seeded:
            try:
                tensor = with_weights(header, entry, tensor)
            except (ValueError, TypeError, OverflowError) as error:
                reader.fail(f"the seed of {entry.names[0]!r} is not one that this package writes ({error!r:.60})")
        tensors.update(dict.fromkeys(entry.names, tensor))
    reader.finish()
    return CompressedFile(_state(header, tensors), CompressedSize(len(data), coder, tuple(sizes)))


def _state(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: OrderedDict[str, Any] = OrderedDict((name, tensors[name]) for name in header.names)
    state.update(header.extras)
    if header.metadata is not None:
        state._metadata = header.metadata  # type: ignore[attr-defined]
    return state


def default_limit(file_bytes: int) -> int:
    """Return how many bytes the tensors of a file may take: 1 GiB or 256 times the file, at most the machine's memory.

    Example:
        >>> default_limit(1000) == 1 << 30
        True
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not every system has sysconf and these names
        memory = 1 << 46
    return min(memory, max(1 << 30, 256 * file_bytes))
