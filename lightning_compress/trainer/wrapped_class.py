"""The classes of wrappers around modules of a class: its own steps and hooks, which the objectives see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule

if TYPE_CHECKING:
    from lightning_compress.trainer.wrapper import CompressionModule


@cache
def class_over(wrapper: type[CompressionModule], own: type[LightningModule]) -> type[CompressionModule]:
    """Return the class of a wrapper around modules of one class."""

    @wraps(own.training_step)  # Lightning reads its signature
    def training_step(self: CompressionModule, *args: Any, **kwargs: Any) -> Any:
        return wrapper.training_step(self, *args, **kwargs)

    def load_from_checkpoint(cls: type, *args: Any, **kwargs: Any) -> LightningModule:
        return own.load_from_checkpoint(*args, **kwargs)

    changed = {name: _evaluated(getattr(own, name)) for name in _EVALUATIONS if _is_own(own, name)}
    changed |= {name: _hooked(name, getattr(own, name)) for name in _HOOKS if _is_own(own, name)}
    namespace: dict[str, Any] = changed | {
        "__slots__": (),
        "__module__": wrapper.__module__,
        "__qualname__": f"{wrapper.__name__}[{own.__name__}]",
        "__doc__": own.__doc__,
        "training_step": training_step,
        "load_from_checkpoint": classmethod(load_from_checkpoint),
    }
    try:
        return type(own.__name__, (wrapper, own), namespace)
    except TypeError as error:  # __slots__, an __init_subclass__ with arguments, another metaclass
        raise ValueError(
            f"{wrapper.__name__} can't wrap {own.__name__}, whose class nothing derives from: {error}."
        ) from error


_EVALUATIONS = ("validation_step", "test_step")
_HOOKS = [
    f"on_{what}_{of}{when}"
    for what in ("train", "validation", "test")
    for of in ("", "epoch_", "batch_")
    for when in ("start", "end")
]


def _is_own(own: type[LightningModule], name: str) -> bool:
    return getattr(own, name) is not getattr(LightningModule, name)


def _evaluated(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a validation or test step that the objectives see."""

    @wraps(method)  # Lightning reads its signature
    def step(self: CompressionModule, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        evaluates = trainer is not None and (trainer.validating or trainer.testing or trainer.sanity_checking)
        around = [level.objective.evaluate for level in self._lightning_compress.levels] if evaluates else []
        return _run_once(self, method, around, *args, **kwargs)

    return step


def _hooked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that the objectives see."""

    @wraps(method)
    def hook(self: CompressionModule, *args: Any, **kwargs: Any) -> Any:
        around = [partial(level.objective.at_hook, name) for level in self._lightning_compress.levels]
        return _run_once(self, method, around, *args, **kwargs)

    return hook


def _run_once(
    module: CompressionModule,
    method: Callable[..., Any],
    around: Sequence[Callable[..., Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a method of the module with others around it, the innermost first; without them if it is called by one."""
    run: Callable[..., Any] = partial(method, module)
    inside = module._lightning_compress
    if inside.inside_one:
        return run(*args, **kwargs)
    for one in around:
        run = partial(one, module, run)
    inside.inside_one = True
    try:
        return run(*args, **kwargs)
    finally:
        inside.inside_one = False
