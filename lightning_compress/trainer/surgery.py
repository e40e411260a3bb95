"""Change a module's shapes while a Trainer holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy


def refuse_forks(trainer: Trainer, callback: Callback) -> None:
    """Raise a ValueError for a strategy whose parent process gets the weights back by a load into the old shapes."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        raise ValueError(
            f"{type(callback).__name__} changes the network's shapes, which strategy='ddp_{strategy._start_method}' "
            f"can't bring back to the main process: use strategy='ddp', or shrink='never'."
        )


@contextmanager
def rewrapped(trainer: Trainer) -> Iterator[None]:
    """Take the module out of its DistributedDataParallel wrapper, and wrap it anew: a reducer keeps the old shapes."""
    strategy = trainer.strategy
    wrapped = isinstance(strategy, DDPStrategy) and strategy.model is not trainer.lightning_module
    if wrapped:
        strategy.model = trainer.lightning_module
    try:
        yield
    finally:
        if wrapped:
            assert isinstance(strategy, DDPStrategy)
            strategy.configure_ddp()
