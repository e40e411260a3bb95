"""The test of a network, and the number that comes of it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden


def check_tested(module: LightningModule, metric: str) -> None:
    """Refuse a module that tests nothing.

    Raises:
        ValueError: It has no test_step.
    """
    if not is_overridden("test_step", module):
        raise ValueError(
            f"{type(module).__name__} has no test_step that logs {metric!r}: write one, or set metric=null to "
            f"compare costs only."
        )


def accuracy(
    module: LightningModule,
    datamodule: LightningDataModule,
    make_trainer: Callable[..., Trainer],
    metric: str,
    *,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> float:
    """Return what the module's test logs as `metric`; nothing is written.

    Args:
        module: The network, with its test_step.
        datamodule: Has the test data.
        make_trainer: Makes a Trainer; its keyword arguments stand over the configured ones.
        metric: The name under which `test_step` logs it.
        callbacks: Of the test.
        options: Further arguments of the Trainer.

    Raises:
        ValueError: The metric is not logged.
    """
    trainer = trainer_of(
        make_trainer,
        **options,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,  # Lightning's repeats samples until all ranks have equally many
    )
    logged: dict[str, float] = {}
    for of_loader in trainer.test(module, datamodule, verbose=False):
        logged |= of_loader
    if metric not in logged:
        raise ValueError(
            f"metric={metric!r} is not logged by the test_step of {type(module).__name__}, which logs "
            f"{', '.join(logged) or 'nothing'}."
        )
    return logged[metric]


def finite(metric: str | None, value: float | None, *, otherwise: str) -> float | None:
    """Return a value that JSON can hold: None for NaN and infinity, which a warning says.

    Args:
        metric: The value's name.
        value: What was found.
        otherwise: What happens to a value that is no number, for the warning.

    Example:
        >>> finite("test_acc", 0.5, otherwise="the report leaves it out")
        0.5
    """
    if value is None or math.isfinite(value):
        return value
    warnings.warn(f"{metric} is {value}, which is no number: {otherwise}.", stacklevel=3)
    return None


def trainer_of(make_trainer: Callable[..., Trainer], **options: Any) -> Trainer:
    """Return a Trainer, without what it tells each time of accelerators, and of what one could install."""
    with quietly("lightning.pytorch"):
        return make_trainer(**options)


@contextmanager
def quietly(name: str, level: int = logging.WARNING) -> Iterator[None]:
    """Have a logger tell nothing below a level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
