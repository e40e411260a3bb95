"""Random weights from a seed that are the same on every machine.

A counter-based generator (numpy's Philox, whose raw 64-bit stream is fixed) yields integers, and weights are made of
them by operations that IEEE 754 rounds correctly: no logarithm, sine or library call enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core.given import real_number, whole_number

Init = Literal["signed_constant", "uniform"]
_FRACTION = 24  # bits: odd numbers below 2^24 are exact in float32
_PIECE = 1 << 16  # entries that are made at a time, to save memory


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """The origin of a parameter's random weights: plain numbers, from which any machine makes the same values.

    Attributes:
        seed: The seed.
        stream: The number of the parameter's stream among those of the seed.
        init: "signed_constant" for -scale and +scale, or "uniform" for values between them.
        scale: The largest magnitude; it is rounded to float32.
        per_kept: Whether the remaining weights are multiplied by (entries / remaining entries).

    Example:
        >>> Seeded(seed=7, stream=0, init="signed_constant", scale=0.5).weights((4,))
        tensor([ 0.5000, -0.5000, -0.5000, -0.5000])
    """

    seed: int
    stream: int
    init: Init
    scale: float
    per_kept: bool = False

    def __post_init__(self) -> None:
        if self.init not in get_args(Init):
            raise ValueError(f"init={self.init!r} is unknown; expected {' or '.join(map(repr, get_args(Init)))}.")
        whole_number(self.seed, "seed is a whole number from 0 to 2^64 - 1", least=0, most=2**64 - 1)
        whole_number(self.stream, "stream is a whole number from 0 to 2^64 - 1", least=0, most=2**64 - 1)
        real_number(self.scale, "scale is a number above 0", above=0)
        if not 0 < float(np.float32(self.scale)) < float("inf"):
            raise ValueError(f"scale must be above 0 and finite in float32 as well; got {self.scale!r}.")
        if not isinstance(self.per_kept, bool):
            raise ValueError(f"per_kept is True or False; got {self.per_kept!r}.")

    @classmethod
    def of(cls, record: Any) -> Seeded:
        """Return the origin that a record describes; a ValueError or TypeError for another record."""
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """Return the record: plain values."""
        return dict(vars(self))

    def weights(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights of a shape, made in float32 and then converted to the dtype."""
        values = np.empty(int(np.prod(shape, dtype=np.int64)), np.float32)
        generator = np.random.Philox(key=np.array([self.seed, self.stream], np.uint64))
        scale = np.float32(self.scale)
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE]
            raw = generator.random_raw(len(piece))
            if self.init == "signed_constant":
                piece[:] = np.where(raw >> np.uint64(63), scale, -scale)
            else:  # odd integers between -2^24 and 2^24, so that no weight is 0; each product rounds once
                odd = 2 * (raw >> np.uint64(64 - _FRACTION)).astype(np.int64) + 1 - (1 << _FRACTION)
                piece[:] = odd.astype(np.float32) * np.float32(2.0**-_FRACTION) * scale
        return torch.from_numpy(values.reshape(shape)).to(dtype)

    def masked(self, ratio: Tensor) -> Tensor:
        """Return the weights times a mask of -1, 0 and 1, on the CPU: the values that a network holds."""
        return masked(self.weights(tuple(ratio.shape), ratio.dtype), ratio.cpu(), per_kept=self.per_kept)

    def ratio(self, values: Tensor) -> Tensor | None:
        """Return the mask of -1, 0 and 1 with which `masked` returns these values bit for bit; None if there is none.

        -0.0 counts as 0.0.
        """
        values = values.detach().cpu()
        found = values.sign().mul_(self.weights(tuple(values.shape), values.dtype).sign_()).add_(0.0)
        return found if torch.equal(self.masked(found), values) else None


def masked(weights: Tensor, mask: Tensor, *, per_kept: bool = False) -> Tensor:
    """Return weights times a mask of -1, 0 and 1, with 0.0 and not -0.0 where it is 0.

    Args:
        weights: The weights.
        mask: The mask, of any dtype.
        per_kept: Whether to multiply by (entries / remaining entries) as well.
    """
    values = (weights * mask.to(weights.dtype)).add_(0.0)
    if per_kept:
        values.mul_(mask.numel() / max(1, int(mask.count_nonzero())))
    return values
