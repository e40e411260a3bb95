"""Testing a network without leaving files behind, and reading its metric."""

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
    """Refuse a module that cannot be tested.

    Raises:
        ValueError: The module has no test_step.
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
    """Test a module, and return the value that it logs as `metric`. No file is written.

    Args:
        module: The network, with its test_step.
        datamodule: The data module with the test data.
        make_trainer: Function that makes a Trainer; its keyword arguments replace the configured ones.
        metric: Name under which `test_step` logs the metric.
        callbacks: Callbacks of the test.
        options: Further arguments of the Trainer.

    Raises:
        ValueError: The test does not log the metric.
    """
    trainer = trainer_of(
        make_trainer,
        **options,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,  # it repeats samples until all ranks have the same number
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
    """Return the value, or None, with a warning, where it is NaN or infinite, which JSON cannot express.

    Args:
        metric: Name of the value.
        value: The value; None stays None.
        otherwise: Consequence of a value that is not finite, for the warning.

    Example:
        >>> finite("test_acc", 0.5, otherwise="the report leaves it out")
        0.5
    """
    if value is None or math.isfinite(value):
        return value
    warnings.warn(f"{metric} is {value}, which is no number: {otherwise}.", stacklevel=3)
    return None


def trainer_of(make_trainer: Callable[..., Trainer], **options: Any) -> Trainer:
    """Return a Trainer, without its messages about accelerators and about packages to install."""
    with quietly("lightning.pytorch"):
        return make_trainer(**options)


@contextmanager
def quietly(name: str, level: int = logging.WARNING) -> Iterator[None]:
    """Suppress a logger's messages below a level, temporarily."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
