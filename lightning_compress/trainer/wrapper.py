"""A LightningModule around another one: everything is shared with it, and only what it is trained to is different."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_compress.trainer.inside import depth
from lightning_compress.trainer.resume import ResumableCallback


class Objective:
    """What a wrapper adds. A plain object, so that none of its names can meet one of the user's module.

    A subclass supplies `step`, and of the others what it needs.

    Args:
        settings: The wrapper's plain constructor arguments: a checkpoint from other settings is recognised by them.

    Attributes:
        extra: Modules with parameters that train beside the network during a fit, and are no part of it: no names in
            its state dict, no target of a pattern.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.extra = nn.ModuleDict()

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `training_step` returns; `run(*args, **kwargs)` is the wrapped module's own step."""
        raise NotImplementedError

    def configure(self, module: LightningModule) -> None:
        """Fill `extra` for a fit: the last moment before checkpoint, device and optimizer."""

    def prepare(self, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None) -> None:
        """Get ready for the first step: the module is on its device. `state` is from a checkpoint's `state`."""

    def at_step(self, step: int) -> None:
        """Act after optimizer step number `step`; 0 is the moment before the first one."""

    def state(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts that a resume needs."""
        return {}


class CompressionModule(LightningModule):
    """A wrapper that shows itself only in `training_step`.

    It is a second object over the `__dict__` of the module inside, of a class that derives from the wrapper's and the
    module's own. So names, state dict, hooks, `hparams`, metrics, `self.trainer` and what the Trainer asks for are the
    module's, whichever of the two objects is asked, and whatever Lightning may add to them; the module itself is not
    edited. Wrappers can stand inside wrappers: each runs the step of the one inside it.

    Args:
        module: The LightningModule inside.
        objective: What is added.

    Raises:
        TypeError: `module` is no LightningModule.
        ValueError: Its step can't be run by another: manual optimization, a `dataloader_iter` step, a compiled module,
            a step that is set on the object; or it has names of its own that the wrapper would hide.
    """

    __slots__ = ("_compression",)
    _compression: _Level

    def __init__(self, module: LightningModule, objective: Objective) -> None:
        check_wrappable(module, type(self))
        callback = ObjectiveCallback(objective, type(self).__name__, depth(module))
        self._stand_around(_Level(module, objective, callback))

    def _stand_around(self, level: _Level) -> None:
        wrapper: Any = type(self)
        inside: Any = type(level.wrapped)
        object.__setattr__(self, "__class__", _class_over(wrapper, inside))
        object.__setattr__(self, "__dict__", level.wrapped.__dict__)
        self._compression = level

    def __reduce__(self) -> tuple[Any, ...]:
        # For copies and other processes: the class can't be found by its name, and the copied two share a dict again.
        wrapper = type(self)._wrapper  # type: ignore[attr-defined]  # of the made class
        return _bare, (wrapper,), self._compression

    def __setstate__(self, level: _Level) -> None:
        self._stand_around(level)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a checkpoint is one of the module inside, whose class loads it."""
        raise TypeError(
            f"A checkpoint that was written with {cls.__name__} holds the module inside, under its own names: call "
            f"load_from_checkpoint of that module's class."
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        level = self._compression
        return level.objective.step(self, level.run, *args, **kwargs)

    def configure_callbacks(self) -> Sequence[Callback]:
        level = self._compression
        found = level.wrapped.configure_callbacks()
        others = list(found) if isinstance(found, Sequence) else [found]
        there = level.callback in self.trainer.callbacks  # type: ignore[attr-defined]  # from the verb before
        return others if there else [*others, level.callback]

    def configure_model(self) -> None:
        level = self._compression
        level.wrapped.configure_model()
        if self._trainer is not None and self._trainer.state.fn == "fit":
            level.objective.configure(self)
            level.fitting = True

    def teardown(self, stage: str) -> None:
        level = self._compression
        level.wrapped.teardown(stage)
        level.fitting = False

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        level = self._compression
        yield from level.wrapped.named_parameters(prefix, recurse, remove_duplicate)
        if level.fitting:  # what asks during a fit is the optimizer, DistributedDataParallel or an average
            mine = f"{level.callback.name}{depth(level.wrapped)}"  # no name that a module could have
            yield from level.objective.extra.named_parameters(f"{prefix}.{mine}" if prefix else mine)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressionModule:
        level = self._compression
        level.wrapped._apply(fn, recurse)  # type: ignore[no-untyped-call]
        level.objective.extra._apply(fn)  # type: ignore[no-untyped-call]
        return self


@dataclass
class _Level:
    """What one wrapper holds beside the shared dict."""

    wrapped: LightningModule
    objective: Objective
    callback: ObjectiveCallback
    fitting: bool = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        # Of the class: in the shared dict there may be the step of the outermost wrapper, compiled.
        return type(self.wrapped).training_step(self.wrapped, *args, **kwargs)


@cache
def _class_over(wrapper: type[CompressionModule], inside: type[LightningModule]) -> type[CompressionModule]:
    """Return the class of a wrapper around modules of one class."""
    own: type[LightningModule] = getattr(inside, "_own", inside)  # of the innermost module

    @wraps(own.training_step)  # Lightning reads its signature
    def training_step(self: CompressionModule, *args: Any, **kwargs: Any) -> Any:
        return wrapper.training_step(self, *args, **kwargs)

    def load_from_checkpoint(cls: type, *args: Any, **kwargs: Any) -> LightningModule:
        return own.load_from_checkpoint(*args, **kwargs)

    namespace: dict[str, Any] = {
        "__slots__": (),
        "__module__": wrapper.__module__,
        "__doc__": own.__doc__,
        "_own": own,
        "_wrapper": wrapper,
        "training_step": training_step,
        "load_from_checkpoint": classmethod(load_from_checkpoint),
    }
    return type(f"{wrapper.__name__}[{own.__name__}]", (wrapper, own), namespace)


def _bare(wrapper: type[CompressionModule]) -> CompressionModule:
    return wrapper.__new__(wrapper)


def check_wrappable(module: LightningModule, wrapper: type[CompressionModule]) -> None:
    """Raise a TypeError or ValueError for a module whose own step a wrapper can't run."""
    name, kind = wrapper.__name__, type(module).__name__
    if isinstance(module, torch._dynamo.OptimizedModule):
        raise ValueError(f"{name} got a compiled {type(module._orig_mod).__name__}: {_COMPILE}")
    if not isinstance(module, LightningModule):
        raise TypeError(f"{name} wraps a LightningModule of `lightning.pytorch`; got {kind}.")
    check_automatic(module, name)
    if "training_step" in vars(module):
        what, how = (
            ("is compiled", _COMPILE) if module._compiler_ctx else ("is set on the object", "Define it in the class.")
        )
        raise ValueError(f"{name} can't run the training_step of {kind}, which {what}. {how}")
    if "dataloader_iter" in inspect.signature(type(module).training_step).parameters:
        raise ValueError(
            f"{name} does not support the training_step(dataloader_iter) of {kind}, which takes its batches itself: "
            f"write training_step(batch, batch_idx)."
        )
    mine = {one for base in wrapper.__mro__ for one in vars(base) if issubclass(base, CompressionModule)}
    hidden = sorted(one for one in mine - set(dir(CompressionModule)) if hasattr(module, one))
    if hidden and not isinstance(module, wrapper):
        raise ValueError(f"{name} has a {hidden[0]} of its own, which would hide that of {kind}: rename yours.")


_COMPILE = "Compile the network inside it instead (self.net = torch.compile(self.net)), and pass network='net'."


def check_automatic(module: LightningModule, name: str) -> None:
    """Raise a ValueError for manual optimization."""
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} does not support the manual optimization of {type(module).__name__} "
            f"(automatic_optimization=False), whose step is over before its loss is known here: take automatic "
            f"optimization, or call the loss functions in that step."
        )


class ObjectiveCallback(ResumableCallback):
    """The wrapper's share of the Trainer's callbacks: refusals, exact resume, the number of the step.

    Args:
        objective: Of the wrapper.
        name: The wrapper's, for messages.
        depth: How many wrappers are inside it.
    """

    def __init__(self, objective: Objective, name: str, depth: int) -> None:
        super().__init__(wrapper=name, depth=depth, **objective.settings)
        self.objective = objective
        self.name = name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_automatic(pl_module, self.name)
        if pl_module._compiler_ctx:
            raise ValueError(f"{self.name} does not support a module that is compiled as a whole. {_COMPILE}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        extra = dict(self.objective.extra.named_parameters())
        if not extra:
            return
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
            raise ValueError(
                f"{self.name} trains parameters beside the network ({', '.join(extra)}), which "
                f"strategy='ddp_{strategy._start_method}' can't bring back to the main process: use strategy='ddp'."
            )
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        trained = {id(one) for group in groups for one in group["params"]}
        left = [name for name, parameter in extra.items() if id(parameter) not in trained]
        if left:
            raise ValueError(
                f"{self.name} has parameters that no optimizer trains: {', '.join(left)}. They are among "
                f"self.parameters() of {type(pl_module).__name__}: let its configure_optimizers take these."
            )

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self.objective.prepare(trainer, pl_module, state)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self.objective.at_step(step)

    def technique_state(self) -> dict[str, Any]:
        return self.objective.state()
