"""Find the targets of a batch, which only the user's own step knows how to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TARGETS = ("labels", "label", "targets", "target", "y")


def targets_of(batch: Any) -> Tensor:
    """Return the targets of a batch: its last part, or what a mapping has under a usual name.

    Raises:
        ValueError: There are none.

    Example:
        >>> import torch
        >>> targets_of({"input_ids": torch.zeros(2, 3), "labels": torch.tensor([1, 0])})
        tensor([1, 0])
    """
    if isinstance(batch, Mapping):
        name = next((one for one in _TARGETS if isinstance(batch.get(one), Tensor)), None)
        found = None if name is None else batch[name]
    else:
        found = batch[-1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if not isinstance(found, Tensor):
        raise ValueError(
            f"A batch is a {type(batch).__name__}, in which the targets can't be told: pass targets=, a function from "
            f"the batch to its targets."
        )
    return found
