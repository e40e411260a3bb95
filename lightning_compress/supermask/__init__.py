"""Masks of random weights. These functions need no Trainer."""

from __future__ import annotations

from lightning_compress.supermask.initial import start_from
from lightning_compress.supermask.masks import (
    below,
    entries_kept,
    first_scores,
    largest,
    same_sign,
    sampled,
    score_gradient_,
)
from lightning_compress.supermask.record import note_origins
from lightning_compress.supermask.weights import SupermaskWeights

__all__ = [
    "SupermaskWeights",
    "below",
    "entries_kept",
    "first_scores",
    "largest",
    "note_origins",
    "same_sign",
    "sampled",
    "score_gradient_",
    "start_from",
]
