"""The parts of a state dict that are written into a file: every tensor once, the metadata, and extra states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_compress.channels.load import is_extra
from lightning_compress.coding.header import Entry, Header
from lightning_compress.coding.patterns import DTYPES


def describe(state: Mapping[str, Any]) -> tuple[Header, list[Tensor]]:
    """Return the header of a state dict, and each tensor once, whatever the number of its names.

    Raises:
        ValueError: An entry is no tensor, not strided, without data, or of a dtype that a file can't hold.
    """
    groups: dict[tuple[object, ...], tuple[list[str], Tensor]] = {}
    extras, names = {}, []
    for name, value in state.items():
        if is_extra(name) and not isinstance(value, Tensor):
            extras[name] = value
            continue
        names.append(name)
        tensor = with_values(name, value)
        same_memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        key = (*same_memory, tensor.is_conj(), tensor.is_neg()) if tensor.numel() else (name,)
        groups.setdefault(key, ([], tensor))[0].append(name)
    entries = tuple(Entry(tuple(group), tensor.dtype, tuple(tensor.shape)) for group, tensor in groups.values())
    metadata = getattr(state, "_metadata", None)
    return Header(entries, tuple(names), metadata, extras), [tensor for _, tensor in groups.values()]


def with_values(name: str, tensor: Any) -> Tensor:
    """Return a tensor as one of torch's own class, whose memory holds its values.

    Raises:
        ValueError: It has none, or a file can't hold them.

    Example:
        >>> with_values("bias", torch.nn.Parameter(torch.ones(2)))
        tensor([1., 1.])
    """
    try:
        text = name.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise ValueError(f"{name!r} is no text that UTF-8 can write, as names in a compressed file are.") from error
    if b"\0" in text:
        raise ValueError(f"{name!r} has a NUL character, which ends names in a compressed file: rename it.")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name!r} is a {type(tensor).__name__}; a compressed file holds tensors only: leave it out.")
    if is_lazy(tensor):
        raise ValueError(f"{name!r} has no values yet: run a batch through the model before it is saved.")
    if tensor.is_nested:
        raise ValueError(f"{name!r} is a nested tensor; a compressed file holds strided ones: unbind() it.")
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # it computes its values when it is asked
        found = _dequantized(tensor)
        if found is None:
            raise ValueError(
                f"{name!r} is a {kind.__name__}, which keeps its values in other tensors and has no dequantize() that "
                f"returns them as {tensor.dtype}: put a plain tensor in its place before saving, such as "
                f"full_tensor() of a DTensor."
            )
        tensor = found
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{name!r} has layout {tensor.layout} on {tensor.device}; expected strided, with data.")
    if tensor.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name!r} has dtype {tensor.dtype}; a compressed file holds {kinds}.")
    with torch._C.DisableTorchFunctionSubclass():
        plain: Tensor = tensor.detach().as_subclass(Tensor)
    if plain.numel() and not _has_memory(plain):
        raise ValueError(f"{name!r} has no memory behind its {plain.numel()} entries: it was freed, or is not here.")
    return plain


def _dequantized(tensor: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            found = tensor.dequantize()
    except Exception:  # whatever its class raises
        return None
    same = type(found) is Tensor and (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
    return found if same and found.layout == torch.strided and not found.is_meta else None


def _has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # of a transform of torch.func
        return False
