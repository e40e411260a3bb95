"""Distillation: a student network learns from the outputs of a teacher for the same inputs."""

from __future__ import annotations

from lightning_compress.core.losses import cosine_loss, logit_regression_loss, soft_target_loss, soften
from lightning_compress.distillation.cache import Indexed
from lightning_compress.distillation.hint_losses import attention_transfer_loss, fitnet_loss

__all__ = [
    "Indexed",
    "attention_transfer_loss",
    "cosine_loss",
    "fitnet_loss",
    "logit_regression_loss",
    "soft_target_loss",
    "soften",
]
