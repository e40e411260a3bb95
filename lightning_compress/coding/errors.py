"""The error for compressed files that are damaged or crafted."""

from __future__ import annotations


class CorruptFileError(ValueError):
    """A compressed file is truncated, damaged or crafted; the message names the file and the fault.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_compress.coding import load_compressed
        >>> path = Path(tempfile.mkdtemp()) / "network.lcz"
        >>> _ = path.write_bytes(bytes([0x89]) + b"LC")
        >>> load_compressed(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_compress.coding.errors.CorruptFileError: ...network.lcz is corrupt: it has 3 bytes, fewer than ...
    """
