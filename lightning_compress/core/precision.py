"""The precision in which sums and statistics are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """Convert a tensor to float32, unless it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
