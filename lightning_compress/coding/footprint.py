"""Measures the footprint of a network, with the bytes of its compressed file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor, nn

from lightning_compress.coding.files import load_compressed, save_compressed
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.measure.footprint import Footprint, measure


def footprint(model: nn.Module, example_inputs: ExampleInputs, *, repeats: int = 30) -> Footprint:
    """Measure parameters, MACs, latency and memory with `measure.footprint.measure`, and bytes with `save_compressed`.

    Args:
        model: Any module. Its parameters, gradients, buffers, modes and hooks, and torch's random state, do not change.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments; batch first, on the
            model's device.
        repeats: The number of forward passes of which the latency is the median.

    Raises:
        ValueError: `measure` refuses the arguments, or a file can't hold the state dict.
        RuntimeError: The loaded tensors differ from the saved ones.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> cost = footprint(net, torch.randn(16, 4))
        >>> cost.parameters, cost.macs, 0 < cost.bytes < 400
        (58, 48, True)
    """
    return measure(model, example_inputs, repeats=repeats, file_bytes=file_bytes)


def file_bytes(model: nn.Module) -> int:
    """Return the size of the network's compressed file, after loading it and comparing all values.

    Raises:
        ValueError: A file can't hold the state dict.
        RuntimeError: The loaded tensors differ from the saved ones.

    Example:
        >>> file_bytes(nn.Linear(10, 10)) < 10 * 11 * 4 + 30
        True
    """
    state = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.lcz"
        size = save_compressed(state, path).bytes
        loaded = load_compressed(path)
    changed = [name for name, one in state.items() if isinstance(one, Tensor) and not _same(one, loaded[name])]
    changed += [name for name, one in state.items() if not isinstance(one, Tensor) and one != loaded[name]]
    if changed:
        raise RuntimeError(
            f"{type(model).__name__}: after save_compressed and load_compressed these entries differ: {changed}. "
            f"Please report this."
        )
    return size


def _same(ours: Tensor, theirs: Tensor) -> bool:
    ours = ours.cpu()
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    both_nan = (ours != ours) & (theirs != theirs)
    return bool(((ours == theirs) | both_nan).all())
