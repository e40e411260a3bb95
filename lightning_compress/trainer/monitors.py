"""Reset monitors once the network is compressed, so that no dense epoch counts as the best one."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.trainer import rng


def count_anew(trainer: Trainer, reason: str, *, stopping_alone: bool = False) -> None:
    """Reset "best so far" of every checkpoint and early-stopping callback, and report it.

    Checkpoint files that were the best until now stay on disk, but `best_model_path` no longer points to them.

    Args:
        trainer: The Trainer.
        reason: Why they count anew, for the report.
        stopping_alone: Whether checkpoint callbacks count on.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and not stopping_alone:
            _reset_checkpoint(callback, reason)
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(_worst(callback.mode))
            rank_zero_info(f"EarlyStopping(monitor={callback.monitor!r}) counts anew: {reason}.")


def validate_before_training(trainer: Trainer) -> None:
    """Run the whole validation once as Lightning's sanity check, which logs, saves and counts nothing.

    The random states are restored afterwards."""
    steps, random_state = trainer.num_sanity_val_steps, rng.capture()
    trainer.num_sanity_val_steps = math.inf
    try:
        trainer._run_sanity_check()
    finally:
        trainer.num_sanity_val_steps = steps
        rng.restore(random_state)


def _reset_checkpoint(callback: ModelCheckpoint, reason: str) -> None:
    earlier = callback.best_model_path
    callback.best_k_models = {}
    callback.best_model_path = ""
    callback.best_model_score = None
    callback.kth_best_model_path = ""
    callback.kth_value = torch.tensor(_worst(callback.mode))
    callback.current_score = None
    kept = (
        f"; {earlier}, the best until now, stays on disk, but best_model_path will name another file" if earlier else ""
    )
    rank_zero_info(f"ModelCheckpoint(monitor={callback.monitor!r}) counts anew: {reason}{kept}.")


def _worst(mode: str) -> float:
    return float("inf") if mode == "min" else float("-inf")
