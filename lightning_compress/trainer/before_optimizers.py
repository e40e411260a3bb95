"""A moment of a fit for which Lightning has no hook: after a checkpoint was loaded, and before the optimizers are made.

    setup -> configure_model -> load of the module -> HERE -> DistributedDataParallel, optimizers -> on_fit_start

Layers that `configure_model` or the module's own `setup` makes exist by then, and it is known whether the fit resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

_RESTORE = "_restore_modules_and_callbacks"  # Lightning's method, which runs at this moment, also with nothing to load
_MAKE = "setup_optimizers"  # the strategy's method that calls `configure_optimizers`
Action = Callable[[], None]
_waiting: WeakKeyDictionary[Trainer, dict[Hashable, tuple[Action, Action]]] = WeakKeyDictionary()


def before_optimizers(trainer: Trainer, key: Hashable, *, before: Action, after: Action) -> None:
    """Call functions right before and right after the load of a fit's checkpoint; call this in `setup`.

    Args:
        trainer: The Trainer, whose fit begins.
        key: Of the caller, whose later call replaces an earlier one.
        before: Called when all layers exist.
        after: Called when the module is loaded; without a checkpoint at the same moment.
    """
    waiting = _waiting.setdefault(trainer, {})
    waiting[key] = (before, after)
    connector: Any = trainer._checkpoint_connector
    if _RESTORE not in vars(connector):
        vars(connector)[_RESTORE] = partial(_restore, trainer, connector)


def shorten_while_optimizers_are_made(trainer: Trainer, limits: Mapping[str, int | None]) -> None:
    """Let `configure_optimizers` see other limits of the fit, so that it plans schedules for a part of it.

    Args:
        trainer: The Trainer, whose optimizers are made next.
        limits: `max_epochs` and `max_steps`, which are put back as soon as the optimizers are made, or fail to be.
    """
    strategy, loop = trainer.strategy, trainer.fit_loop
    keep_limits(trainer)

    def make(trainer: Trainer) -> None:
        keep_limits(trainer)
        whole = loop.max_epochs, loop.epoch_loop.max_steps
        loop.max_epochs, loop.epoch_loop.max_steps = limits["max_epochs"], limits["max_steps"]  # type: ignore[assignment]
        try:
            strategy.setup_optimizers(trainer)
        finally:
            loop.max_epochs, loop.epoch_loop.max_steps = whole

    vars(strategy)[_MAKE] = make


def keep_limits(trainer: Trainer) -> None:
    """Undo `shorten_while_optimizers_are_made`, where a fit has ended before its optimizers were made."""
    vars(trainer.strategy).pop(_MAKE, None)


def is_resumed(trainer: Trainer) -> bool:
    """Return whether a checkpoint was loaded for the fit that begins."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def _restore(trainer: Trainer, connector: Any, *args: Any, **kwargs: Any) -> None:
    del vars(connector)[_RESTORE]
    waiting = _waiting.pop(trainer, {})
    actions = (
        list(waiting.values()) if trainer.state.fn == "fit" else []
    )  # else they are left by a fit that was refused
    for before, _ in actions:
        before()
    getattr(connector, _RESTORE)(*args, **kwargs)
    for _, after in actions:
        after()
