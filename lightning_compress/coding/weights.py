"""Loads weights from a file strictly into a module."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_compress.coding import load_compressed
from lightning_compress.coding.checkpoints import misfits
from lightning_compress.core.structure import following


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a checkpoint, a state dict or a compressed file into a module; every name and shape must fit.

    Args:
        module: A LightningModule, or any module.
        path: A file that `Trainer`, `torch.save` or `save_compressed` wrote.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds no tensors, or they do not fit the module.

    Example:
        >>> import tempfile
        >>> import torch
        >>> path = Path(tempfile.mkdtemp()) / "dense.pt"
        >>> torch.save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, path)
        >>> layer = nn.Linear(2, 1)
        >>> load_weights(layer, path)
        >>> layer(torch.ones(1, 2)).item()
        2.0
    """
    state = load_compressed(path)
    if problems := misfits(state, module, thinner=False):
        raise ValueError(f"{path} does not fit {type(module).__name__}: {problems}.")
    with following(module):
        module.load_state_dict(state)
