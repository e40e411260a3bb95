"""Reports the size of a compressed file, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from math import prod

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_compress.coding.encodings.tensor import Encoding
from lightning_compress.coding.header import Entry


@dataclass(frozen=True)
class TensorSize:
    """The size of one tensor in a compressed file.

    Attributes:
        names: The names of the tensor; several if it is tied.
        shape: The shape of the tensor.
        dtype: The dtype of the tensor, without "torch.".
        encoding: How the tensor is stored, in words.
        bytes: The tensor's share of the file, with its codebook and frequency table. It may be a fraction, because
            tensors do not start at whole bytes of the stream.
        dense_bytes: The bytes of the uncompressed tensor.
        distinct: The number of values of the tensor's codebook or grid; None without one.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    bytes: float
    dense_bytes: int
    distinct: int | None

    @classmethod
    def of(cls, entry: Entry, encoding: Encoding, bits: float) -> TensorSize:
        """Return the size of the tensor that a header entry describes."""
        kind = str(entry.dtype).removeprefix("torch.")
        return cls(entry.names, entry.shape, kind, encoding.name, bits / 8, entry.bytes, encoding.distinct)

    @property
    def bits_per_weight(self) -> float:
        """The bits of the file per entry; 0 for a tensor without entries."""
        return 8 * self.bytes / prod(self.shape) if prod(self.shape) else 0.0

    @property
    def formula_bits(self) -> float:
        """The bits by Deep Compression's formula: n log2 k + k b with a codebook, n b without."""
        entries, bits = prod(self.shape), 8 * self.dense_bytes
        if self.distinct is None or not entries:
            return bits
        return min(bits, entries * math.log2(self.distinct) + self.distinct * bits / entries)


@dataclass(frozen=True)
class CompressedSize:
    """The size of a compressed file; `print` shows it as a table.

    Attributes:
        bytes: The size of the file.
        coder: The coder of its symbols.
        tensors: The size of each tensor, in the file's order; the other bytes are names, shapes and checksum.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from lightning_compress.coding import save_compressed
        >>> size = save_compressed({"w": torch.randn(100).sign()}, Path(tempfile.mkdtemp()) / "network.lcz")
        >>> size.bytes < 50, size.tensors[0].dense_bytes
        (True, 400)
    """

    bytes: int
    coder: str
    tensors: tuple[TensorSize, ...]

    @property
    def dense_bytes(self) -> int:
        """The bytes of the uncompressed tensors; a tied tensor counts once."""
        return sum(tensor.dense_bytes for tensor in self.tensors)

    @property
    def rate(self) -> float:
        """How many times smaller the file is than its tensors: dense_bytes / bytes."""
        return self.dense_bytes / self.bytes

    @property
    def formula_rate(self) -> float:
        """Deep Compression's r = n b / (n log2 k + k b), over all tensors.

        A tensor of n entries of b bits shares k values; a tensor without a codebook counts n b on both sides. The
        formula ignores entropy coding, the encoding of zeros, names and shapes, so the file may be smaller or larger.
        """
        bits = sum(tensor.formula_bits for tensor in self.tensors)
        return 8 * self.dense_bytes / bits if bits else 1.0

    def __rich__(self) -> Table:
        caption = Text(
            f"{self.bytes:,} bytes, coder {self.coder}: {self.rate:.1f}x smaller than {self.dense_bytes:,} in memory; "
            f"the formula n b / (n log2 k + k b), without entropy coding, gives {self.formula_rate:.1f}x."
        )
        table = Table(title="Size of each tensor", title_style="bold", caption=caption, caption_justify="left")
        for heading in ("tensor", "shape, stored as"):
            table.add_column(heading, overflow="fold")
        for heading in ("bytes", "bits per\nweight", "share"):
            table.add_column(heading, justify="right", no_wrap=True)  # numbers must not wrap
        for row in self._rows():
            table.add_row(*map(Text, row))  # in a plain string, brackets of a name would be markup
        return table

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for tensor in self.tensors:
            yield (
                " = ".join(tensor.names),
                f"{' x '.join(map(str, tensor.shape)) or 'scalar'}, {tensor.dtype}: {tensor.encoding}",
                f"{tensor.bytes:,.1f}",
                f"{tensor.bits_per_weight:.3f}",
                f"{tensor.bytes / self.bytes:.1%}",
            )
        rest = self.bytes - sum(tensor.bytes for tensor in self.tensors)
        yield ("names, shapes, checksum", "", f"{rest:,.1f}", "", f"{rest / self.bytes:.1%}")

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=140)
        console.print(self)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()
