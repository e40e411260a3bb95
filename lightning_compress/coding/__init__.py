"""Saves a network in one small file and loads it; README.md describes the format."""

from lightning_compress.coding.errors import CorruptFileError
from lightning_compress.coding.files import load_compressed, save_compressed
from lightning_compress.coding.size import CompressedSize

__all__ = ["CompressedSize", "CorruptFileError", "load_compressed", "save_compressed"]
