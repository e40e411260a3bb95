"""Binary weights and binary inputs. These functions need no Trainer."""

from __future__ import annotations

from lightning_compress.binary.inputs import binarize_inputs
from lightning_compress.binary.signs import binarize, channel_scales, draw_positive, real_gradient, sign, sign_through
from lightning_compress.binary.weights import BinaryWeights, binarize_weights

__all__ = [
    "BinaryWeights",
    "binarize",
    "binarize_inputs",
    "binarize_weights",
    "channel_scales",
    "draw_positive",
    "real_gradient",
    "sign",
    "sign_through",
]
