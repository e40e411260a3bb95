"""A network as one small file: see README.md for what is in it."""

from lightning_compress.coding.errors import CorruptFileError
from lightning_compress.coding.files import load_compressed, save_compressed
from lightning_compress.coding.size import CompressedSize

__all__ = ["CompressedSize", "CorruptFileError", "load_compressed", "save_compressed"]
