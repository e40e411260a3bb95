"""Bit-for-bit comparison of nested results, with the path of what differs."""

from __future__ import annotations

from typing import Any

import torch


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.shape == right.shape and torch.equal(left.cpu(), right.cpu())
        return [] if same else [path]
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{path}: keys {left.keys() ^ right.keys()}"]
        return [found for key in left for found in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return [f"{path}: length {len(left)} and {len(right)}"]
        pairs = enumerate(zip(left, right, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{path}/{i}")]
    return [] if left == right else [f"{path}: {left!r} and {right!r}"]
