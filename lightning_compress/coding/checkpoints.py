"""Reads state dicts from checkpoints, and loads the state dict of a cut network into the user's dense class."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress.channels.load import adopt_state, has_record, is_extra
from lightning_compress.core.lost_records import added_names
from lightning_compress.core.records import kind_class, records
from lightning_compress.core.tensors import named_tensors


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state dict of a Lightning checkpoint, or a plain state dict, to the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no weights at {path} (looked for in {path.absolute().parent}).")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, or holds objects besides tensors and plain values. Save only the state_dict."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) or is_extra(name) for name, one in state.items()):
        raise ValueError(
            f"{path} is neither a Lightning checkpoint nor a state dict; it holds a {type(state).__name__}. Give a "
            f"file with the state dict of a module."
        )
    return state


def adopt(model: nn.Module, state: dict[str, Tensor], source: str | os.PathLike[str]) -> nn.Module:
    """Give a dense network the weights of a state dict, and the shapes if the state dict is of a cut network.

    Args:
        model: The network; it is returned.
        state: The state dict of a network of the same class. If the network was cut, the state dict's metadata must
            contain the record of the cut.
        source: The file of the state dict, for the message.

    Raises:
        ValueError: The state dict is of another network; the model is unchanged.

    Example:
        >>> adopt(nn.Linear(3, 2), nn.Linear(3, 1).state_dict(), "other.pt")
        Traceback (most recent call last):
        ValueError: other.pt does not fit Linear: weight is (1, 3) in the file and (2, 3) in the module; ...
    """
    if empty := [name for name, tensor in named_tensors(model).items() if tensor.is_meta]:
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where {_some(set(empty))} can't hold values. Give it "
            f"memory first: model.to_empty(device='cpu')."
        )
    cut = has_record(state)
    if problems := misfits(state, model, thinner=cut):
        if not cut and not misfits(state, model, thinner=True):
            problems += ". The file's tensors are smaller, but it has no record of a cut: it is of another network, or "
            problems += "was saved without the metadata of its state dict"
        raise ValueError(f"{source} does not fit {type(model).__name__}: {problems}.")
    adopt_state(model, state)
    return model


def misfits(state: dict[str, Tensor], model: nn.Module, *, thinner: bool) -> str:
    """Describe the entries of a state dict that do not fit a module; "" if all fit, or if a record renames tensors.

    Args:
        state: The state dict.
        model: The module.
        thinner: Whether tensors may be smaller than the module's.

    Raises:
        RecordError: A record has no form that any version writes.
        UnknownRecordError: This version does not know a record.
    """
    found = records(getattr(state, "_metadata", None))
    if any(kind_class(kind).renames for kind in found):
        return ""  # the strict load checks the names once the network has been rebuilt
    mine = model.state_dict()
    if added := added_names(found):
        state = {name: one for name, one in state.items() if name in mine or not name.startswith(added)}
    both = {name for name in mine.keys() & state.keys() if not is_extra(name) and not is_lazy(mine[name])}
    problems = [
        f"the file has no {_some(mine.keys() - state.keys())}" if mine.keys() - state.keys() else "",
        f"the file has {_some(state.keys() - mine.keys())}, which the module does not have"
        if state.keys() - mine.keys()
        else "",
        *(
            f"{name} is {tuple(state[name].shape)} in the file and {tuple(mine[name].shape)} in the module"
            for name in mine
            if name in both and not _fits(tuple(state[name].shape), tuple(mine[name].shape), thinner=thinner)
        ),
    ]
    return "; ".join(filter(None, problems))


def _fits(shape: tuple[int, ...], mine: tuple[int, ...], *, thinner: bool) -> bool:
    if shape == mine:
        return True
    return thinner and len(shape) == len(mine) and all(0 < a <= b for a, b in zip(shape, mine, strict=True))


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
