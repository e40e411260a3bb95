"""Masks of attention, in the Python that torch.jit.script reads."""

from __future__ import annotations

import torch
from torch import Tensor


def merged_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the sum of both masks, -inf at hidden places, in a shape that broadcasts to (N, H, L, S)."""
    batch, heads, length, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    mask: Tensor | None = None
    if attn_mask is not None:
        expected = [length, keys] if attn_mask.dim() == 2 else [batch * heads, length, keys]
        if list(attn_mask.shape) != expected:
            raise ValueError(
                f"attn_mask has shape {shape_of(attn_mask)}, expected ({length}, {keys}) or, for {batch} samples "
                f"and {heads} heads, ({batch * heads}, {length}, {keys})."
            )
        given = _additive(attn_mask, q.dtype)
        mask = given if given.dim() == 2 else torch.unflatten(given, 0, [batch, -1])
    if key_padding_mask is not None:
        padding = key_padding_mask.unsqueeze(0) if key_padding_mask.dim() == 1 else key_padding_mask
        if list(padding.shape) != [batch, keys]:
            raise ValueError(
                f"key_padding_mask has shape {shape_of(padding)}, expected ({batch}, {keys}), or ({keys},) "
                "without a batch."
            )
        padding = _additive(padding, q.dtype)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    return mask if mask is None else mask.to(q.dtype)


def shape_of(tensor: Tensor) -> str:
    """Return a tensor's shape as text."""
    return "(" + ", ".join([str(size) for size in tensor.shape]) + ")"


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"A mask must be boolean or floating point; got {mask.dtype}.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
