"""Splits a state dict into the parts that a file stores: each tensor once, the metadata, and extra states."""

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
    """Return the header of a state dict, and each tensor once, even if it has several names.

    Raises:
        ValueError: An entry is not a tensor, or is a tensor whose layout, dtype or missing data a file can't hold.
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
    """Return a tensor as a plain `torch.Tensor` whose memory holds its values.

    Args:
        name: The name of the tensor, for messages.
        tensor: The tensor.

    Raises:
        ValueError: The tensor has no values, or a file can't hold them.

    Example:
        >>> with_values("bias", torch.nn.Parameter(torch.ones(2)))
        tensor([1., 1.])
    """
    try:
        text = name.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise ValueError(f"The name {name!r} is not UTF-8 text, as a compressed file needs it: rename it.") from error
    if b"\0" in text:
        raise ValueError(f"The name {name!r} has a NUL character, which ends names in a compressed file: rename it.")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name!r} is a {type(tensor).__name__}; a compressed file holds only tensors. Leave it out.")
    if is_lazy(tensor):
        raise ValueError(f"{name!r} has no values yet. Run a batch through the model before you save it.")
    if tensor.is_nested:
        raise ValueError(
            f"{name!r} is a nested tensor; a compressed file holds only strided ones. Call unbind() on it."
        )
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # such a tensor may have no memory of its own
        found = _dequantized(tensor)
        if found is None:
            raise ValueError(
                f"{name!r} is a {kind.__name__}, which keeps its values in other tensors and has no dequantize() that "
                f"returns them as {tensor.dtype}. Replace it by a plain tensor before saving, such as full_tensor() of "
                f"a DTensor."
            )
        tensor = found
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(
            f"{name!r} has layout {tensor.layout} on device {tensor.device}; a compressed file holds strided tensors "
            f"with data. Convert it, for example with to_dense()."
        )
    if tensor.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name!r} has dtype {tensor.dtype}; a compressed file holds {kinds}. Convert it.")
    with torch._C.DisableTorchFunctionSubclass():
        plain: Tensor = tensor.detach().as_subclass(Tensor)
    if plain.numel() and not _has_memory(plain):
        raise ValueError(
            f"{name!r} has {plain.numel()} entries but no memory: its storage was freed, or never allocated. Restore "
            f"its values before saving."
        )
    return plain


def _dequantized(tensor: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            found = tensor.dequantize()
    except Exception:  # a tensor subclass may raise anything
        return None
    same = type(found) is Tensor and (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
    return found if same and found.layout == torch.strided and not found.is_meta else None


def _has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # as for tensors within a transform of torch.func
        return False
