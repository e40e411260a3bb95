"""Weights from a file into a module, strictly."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a Lightning checkpoint or a plain state dict into the module, on the CPU; every name and shape must fit.

    Args:
        module: A LightningModule, or any module.
        path: A file that `Trainer` or `torch.save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of tensors, or not of this module.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "dense.pt"
        >>> torch.save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, path)
        >>> layer = nn.Linear(2, 1)
        >>> load_weights(layer, path)
        >>> layer(torch.ones(1, 2)).item()
        2.0
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no weights at {path} (looked for in {path.absolute().parent}).")
    state = _read(path)
    mine = module.state_dict()
    problems = [
        f"it has no {_some(mine.keys() - state.keys())}" if mine.keys() - state.keys() else "",
        f"it has {_some(state.keys() - mine.keys())}, which the module has not" if state.keys() - mine.keys() else "",
        *(
            f"{name} is {tuple(state[name].shape)} in it and {tuple(mine[name].shape)} in the module"
            for name in mine.keys() & state.keys()
            if state[name].shape != mine[name].shape
        ),
    ]
    if any(problems):
        raise ValueError(f"{path} does not fit {type(module).__name__}: {'; '.join(filter(None, problems))}.")
    module.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, or holds objects beside tensors and plain values: save the state_dict alone."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} is neither a Lightning checkpoint nor a state dict; it holds a {type(state).__name__}."
        )
    return state


def _some(names: Sequence[str] | set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
