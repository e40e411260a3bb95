"""Writes and reads text and records, deflated with a dictionary of words that are frequent in state dicts."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from lightning_compress.coding.streams import Reader, Writer

_EACH = 1024  # bytes that a name and its tensor take in memory, values not counted

# The likeliest words are last, where their distance is shortest. Any change makes old files unreadable.
_USUAL = (
    b"d\x01s\x07versioni\x01\x02lightning_compressd\x04s\x07numbersdense_shapesdense_numbers buffers out_channels "
    b"in_channels num_features out_features in_features num_heads groups attention.self.query key value output.dense "
    b"LayerNorm embeddings encoder.layers.0.self_attn.in_proj_weight out_proj linear1 linear2 norm1 norm2 mlp patch "
    b"features.0.0.weight\0classifier.weight\0classifier.bias\0downsample.0.weight\0downsample.1.running_mean\0layer4.1."
    b"layer3.1.layer2.1.layer1.0.conv1.weight\0layer1.0.bn1.weight\0bn1.bias\0bn1.running_mean\0bn1.running_var\0"
    b"bn1.num_batches_tracked\0network.head.weight\0network.conv1.weight\0network.conv2.weight\0network.fc.weight\0"
    b"network.fc.bias\x000.weight\x000.bias\x002.weight\x002.bias\0conv1.weight\0conv1.bias\0conv2.weight\0conv2.bias\0"
    b"fc1.weight\0fc1.bias\0fc2.weight\0fc2.bias\0fc3.weight\0fc3.bias"
)


def memory_of_names(names: Iterable[str]) -> int:
    """Estimate how many bytes of memory the names, their tensors without values, and the modules' metadata take.

    Example:
        >>> memory_of_names(["a.b.c"]) - memory_of_names(["a"])
        8
    """
    total = 0
    for name in names:
        total += _EACH + len(name) - 1
        place = name.find(".")
        while place >= 0:  # the metadata have an entry for each module on the path
            total += place
            place = name.find(".", place + 1)
    return total


def write_text(writer: Writer, data: bytes) -> None:
    """Write bytes, deflated if that is shorter."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _USUAL)
    deflated = packer.compress(data) + packer.flush()
    shorter = len(deflated) < len(data)
    writer.uniform([int(shorter)], 2)
    writer.number(len(deflated) if shorter else len(data))
    writer.raw(deflated if shorter else data)


def read_text(reader: Reader, limit: int) -> bytes:
    """Read the bytes that `write_text` wrote, at most `limit` of them."""
    deflated = reader.uniform(1, 2)[0]
    data = bytes(reader.raw(reader.number()))
    if not deflated:
        return data
    unpacker = zlib.decompressobj(-15, _USUAL)
    try:
        found = unpacker.decompress(data, limit)
    except zlib.error as error:
        reader.fail(f"its names or metadata can't be inflated ({error})")
    if not unpacker.eof or unpacker.unused_data:
        reader.fail(f"its names or metadata are truncated, or take more than the {limit} bytes that they may")
    return found
