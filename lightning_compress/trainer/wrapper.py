"""A LightningModule around another one, which shares everything with it and changes the training objective alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.operating_points import OperatingPoint
from lightning_compress.trainer.outline import Outline
from lightning_compress.trainer.replica import Replica
from lightning_compress.trainer.resume import ResumableCallback
from lightning_compress.trainer.unwrap import LOGGED, SLOT, innermost
from lightning_compress.trainer.wrapped_class import class_over


class Objective:
    """The objective that a wrapper adds. It is a plain object, so that none of its names can clash with the user's.

    A subclass supplies `step`, and of the others what it needs.

    Args:
        settings: The wrapper's plain constructor arguments: a checkpoint from other settings is recognised by them.

    Attributes:
        auxiliary: Modules with parameters that train with the network during a fit and are no part of it: no names in
            its state dict, no target of a pattern.
        depth: How many wrappers are inside this one.
        fitting: Whether a fit goes on, in which `auxiliary` is among the wrapper's parameters.
        refuses_replays: Whether no other wrapper may run its steps several times for a batch, which a rule refuses.
        replicas: What the replays of a step have to themselves, by the folder of what they log: see `trainer.replica`.
    """

    refuses_replays: ClassVar[bool] = False

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.auxiliary = nn.ModuleDict()
        self.depth = 0
        self.fitting = False
        self.replicas: dict[str, Replica] = {}

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `training_step` returns; `run(*args, **kwargs)` is the step without this wrapper."""
        raise NotImplementedError(f"{type(self).__name__} must supply step().")

    def evaluate(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `validation_step` or `test_step` returns; `run(*args, **kwargs)` is the step without this."""
        return run(*args, **kwargs)

    def at_hook(self, name: str, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module's own hook `name` at the start or end of a fit, validation or test, epoch or batch."""
        return run(*args, **kwargs)

    def configure(self, module: LightningModule) -> None:
        """Add parameters for a fit, before checkpoint, device and optimizer; it may be called more than once."""

    def prepare(self, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None) -> None:
        """Get ready for the first step: the module is on its device. `state` is from a checkpoint's `state`."""

    def finish(self, module: LightningModule) -> None:
        """Undo at a fit's end, also after an error, what `configure` has set for the time of the fit."""

    def own_parameters(self, module: LightningModule) -> Mapping[str, nn.Parameter]:
        """Return by name the parameters that the technique has added, and that an optimizer must train."""
        return dict(self.auxiliary.named_parameters())

    def follow_epochs(self, moment: Callable[[int], int]) -> None:
        """Move planned steps, as `ResumableCallback.follow_epochs` does."""

    def at_step(self, step: int) -> None:
        """Act after optimizer step number `step`; 0 is the moment before the first one."""

    def before_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Act in a fit before each validation, and at the ends of its epochs and of the fit; on all ranks."""

    def after_evaluation(self, trainer: Trainer, module: LightningModule) -> None:
        """Act at the end of each validation and test, where values can be logged; on all ranks."""

    def synchronize(self) -> None:
        """Bring together for a checkpoint what the ranks have; all of them call this."""

    def state(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts that a resume needs."""
        return {}

    def effects(self, trainer: Trainer | None, module: LightningModule) -> Effects:
        """Return what the technique does in the fit that starts: as `DeclaresEffects.effects`."""
        return Effects(modules=frozenset(name for name, _ in self.auxiliary.named_parameters()))

    def progress(self) -> Progress:
        """Return how far the technique has come: as `DeclaresEffects.progress`."""
        return Progress()

    def logged_name(self, name: str) -> str:
        """Return the name under which this wrapper logs a number: a wrapper around one wrapper adds "_2"."""
        return f"{LOGGED}{name}_{self.depth + 1}" if self.depth else f"{LOGGED}{name}"


class CompressionModule(LightningModule):
    """A wrapper that differs from the module inside only in what its steps compute.

    It is a second object over the `__dict__` of the module inside, of a class that derives from the wrapper's and the
    module's own. So names, state dict, hooks, `hparams`, metrics, `self.trainer` and what the Trainer asks for are the
    module's, whichever of the two objects is asked, and whatever Lightning may add to them; the module itself is not
    edited. In all hooks and in the step, `self` is the outermost wrapper, which the Trainer has.

    Args:
        module: The LightningModule inside, or a wrapper around one: each runs the step of the one inside it.
        objective: What is added.

    Raises:
        TypeError: `module` is no LightningModule.
        ValueError: Its step can't be run by another: manual optimization, a `dataloader_iter` step, a compiled module,
            a step that is set on the object; its class can't be derived from, or has names that the wrapper would hide.
    """

    __slots__ = (SLOT,)  # not in the shared dict
    _lightning_compress: _Inside

    def __init__(self, module: LightningModule, objective: Objective) -> None:
        check_wrappable(module, type(self))
        levels = module._lightning_compress.levels if isinstance(module, CompressionModule) else ()
        objective.depth = len(levels)
        level = _Level(objective, ObjectiveCallback(objective, type(self).__name__))
        self._stand_around(_Inside(innermost(module), (*levels, level), module))

    def _stand_around(self, inside: _Inside) -> None:
        wrapper: Any = type(self)
        own: Any = type(inside.own)
        object.__setattr__(self, "__class__", class_over(wrapper, own))
        object.__setattr__(self, "__dict__", vars(inside.own))
        object.__setattr__(self, SLOT, inside)

    def __reduce__(self) -> tuple[Any, ...]:
        # For copies and other processes: the class can't be found by its name, and the copied two share a dict again.
        return _bare, (type(self).__bases__[0],), self._lightning_compress

    def __setstate__(self, inside: _Inside) -> None:
        self._stand_around(inside)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a checkpoint is one of the module inside, whose class loads it."""
        raise TypeError(
            f"A checkpoint that was written with {cls.__name__} holds the module inside, under its own names: call "
            f"load_from_checkpoint of that module's class."
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = type(self).__bases__[1]
        run: Callable[..., Any] = partial(own.training_step, self)
        if self._trainer is None or self._trainer.training:  # a validation_step may call it as well
            for level in self._lightning_compress.levels:
                run = partial(level.objective.step, self, run)
        return run(*args, **kwargs)

    def operating_points(self) -> list[OperatingPoint]:
        """Return the ways in which the trained network can be run, beside running all of it."""
        return []

    def outline(self, inputs: ExampleInputs) -> Outline | None:
        """Return what the wrapper would add in a fit, for a dry run; None: it is not said.

        Args:
            inputs: What the network is called with.
        """
        return None

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        inside = self._lightning_compress
        inside.logged += 1
        for folder in inside.folders:
            super().log(f"{folder}{name}", *args, **kwargs)

    def configure_callbacks(self) -> Sequence[Callback]:
        found = super().configure_callbacks()
        others = list(found) if isinstance(found, Sequence) else [found]
        mine = [level.callback for level in self._lightning_compress.levels]
        there = self.trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
        return others if all(one in there for one in mine) else [*others, *mine]  # there: from the verb before

    def configure_model(self) -> None:
        super().configure_model()
        if self._trainer is not None and self._trainer.state.fn == "fit":
            for level in self._lightning_compress.levels:
                level.objective.configure(self)
                level.objective.fitting = True

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        for level in self._lightning_compress.levels:
            level.objective.fitting = False
            level.objective.finish(self)
        # Lightning leaves it there with DistributedDataParallel; a pickle of the module would hold this wrapper by it.
        if getattr(vars(self).get("forward"), "__self__", None) is self:
            del self.forward

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        for level in self._lightning_compress.levels:
            if level.objective.fitting:  # what asks is the optimizer, DistributedDataParallel or an average
                mine = f"{level.callback.name}{level.objective.depth}"  # no name that a module could have
                yield from level.objective.auxiliary.named_parameters(f"{prefix}.{mine}" if prefix else mine)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for level in self._lightning_compress.levels:
            for label, replica in level.objective.replicas.items():
                for path, metric in replica.metrics.items():  # Lightning, and a resume, look for metrics by their names
                    name = f"{label}/{path}"
                    yield from metric.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressionModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for level in self._lightning_compress.levels:
            level.objective.auxiliary._apply(fn)  # type: ignore[no-untyped-call]
        return self


@dataclass
class _Level:
    objective: Objective
    callback: ObjectiveCallback


@dataclass
class _Inside:
    """What a wrapper holds.

    Attributes:
        own: The user's module.
        levels: The wrappers around it, the innermost first.
        wrapped: What the outermost one was put around: the user's module, or a wrapper.
        folders: Of what is logged now, each with a slash at its end: the first is that of the step or replay that runs.
        inside_one: Whether a validation or test step runs, or a hook, which may call another one.
        logged: How many values have been logged.
    """

    own: LightningModule
    levels: tuple[_Level, ...]
    wrapped: LightningModule
    folders: tuple[str, ...] = ("",)
    inside_one: bool = False
    logged: int = 0


def _bare(wrapper: type[CompressionModule]) -> CompressionModule:
    return wrapper.__new__(wrapper)


def check_wrappable(module: LightningModule, wrapper: type[CompressionModule]) -> None:
    """Raise a TypeError or ValueError for a module whose own step a wrapper can't run."""
    name, kind = wrapper.__name__, type(module).__name__
    if isinstance(module, torch._dynamo.OptimizedModule):
        raise ValueError(f"{name} got a compiled {type(module._orig_mod).__name__}: {_COMPILE}")
    if not isinstance(module, LightningModule):
        raise TypeError(f"{name} wraps a LightningModule of `lightning.pytorch`; got {kind}.")
    check_step(module, name)
    if "dataloader_iter" in inspect.signature(type(module).training_step).parameters:
        raise ValueError(
            f"{name} does not support the training_step(dataloader_iter) of {kind}, which takes its batches itself: "
            f"write training_step(batch, batch_idx)."
        )
    mine = {one for base in wrapper.__mro__ for one in vars(base) if issubclass(base, CompressionModule)}
    theirs = {*dir(type(innermost(module))), *vars(module), *module._modules, *module._parameters, *module._buffers}
    common = set(dir(CompressionModule)) & set(dir(LightningModule))
    hidden = sorted(one for one in (mine & theirs) - common if not one.startswith("__"))
    if hidden:
        raise ValueError(f"{name} has {hidden[0]!r} of its own, which would hide that of {kind}: rename yours.")


def check_step(module: LightningModule, name: str) -> None:
    """Raise a ValueError for manual optimization, and for a step that is not that of the class."""
    kind = type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} does not support the manual optimization of {kind} (automatic_optimization=False), whose step is "
            f"over before its loss is known here: take automatic optimization, or call the loss functions in that step."
        )
    if module._compiler_ctx:
        raise ValueError(f"{name} does not support a {kind} that is compiled as a whole. {_COMPILE}")
    if "training_step" in vars(module):
        raise ValueError(
            f"{name} can't run the training_step of {kind}, which is set on the object: put it into the class."
        )


_COMPILE = "Compile the network inside it instead (self.net = torch.compile(self.net)), and pass network='net'."


class ObjectiveCallback(ResumableCallback):
    """The wrapper's share of the Trainer's callbacks: refusals, exact resume, the number of the step.

    Args:
        objective: Of the wrapper.
        name: The wrapper's, for messages.
    """

    def __init__(self, objective: Objective, name: str) -> None:
        super().__init__(wrapper=name, depth=objective.depth, **objective.settings)
        self.objective = objective
        self.name = name
        self._said_not_finite = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not (isinstance(pl_module, CompressionModule) and self._stands_around(pl_module)):
            # Left in this Trainer by a fit of another module, for whose checkpoint it was still wanted.
            trainer.callbacks = [one for one in trainer.callbacks if one is not self]  # type: ignore[attr-defined]
            return
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_step(pl_module, self.name)

    def _stands_around(self, module: CompressionModule) -> bool:
        return any(level.callback is self for level in module._lightning_compress.levels)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.objective.fitting = False
        self.objective.finish(pl_module)

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        return self.objective.effects(trainer, pl_module)

    def progress(self) -> Progress:
        return self.objective.progress()

    def logged_name(self, trainer: Trainer, name: str) -> str:
        return self.objective.logged_name(name)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._said_not_finite = False
        added = self.objective.own_parameters(pl_module)
        if not added:
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        trained = {id(one) for group in groups for one in group["params"]}
        left = [name for name, one in added.items() if one.requires_grad and id(one) not in trained]
        if left:
            raise ValueError(
                f"{self.name} has parameters that no optimizer trains: {', '.join(left)}. They are among "
                f"self.parameters() of {type(pl_module).__name__}: let its configure_optimizers take these, or freeze "
                f"them with requires_grad_(False) if they are to stay as they are."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.objective.before_evaluation(trainer, pl_module)
        if self._said_not_finite:
            return
        added = {name: one for name, one in self.objective.own_parameters(pl_module).items() if one.requires_grad}
        if added and not bool(torch.stack([one.detach().isfinite().all() for one in added.values()]).all()):
            self._said_not_finite = True
            first = next(name for name, one in added.items() if not bool(one.isfinite().all()))
            rank_zero_warn(
                f"{self.name}: {first} has values that are no finite numbers since epoch {trainer.current_epoch}, so "
                f"that it learns nothing any more. Take a smaller learning rate, such as Adam's with 0.001."
            )

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self.objective.prepare(trainer, pl_module, state)

    def follow_epochs(self, trainer: Trainer, moment: Callable[[int], int]) -> None:
        self.objective.follow_epochs(moment)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self.objective.at_step(step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.objective.before_evaluation(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.objective.after_evaluation(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.objective.after_evaluation(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.objective.before_evaluation(trainer, pl_module)

    def synchronize(self) -> None:
        self.objective.synchronize()

    def technique_state(self) -> dict[str, Any]:
        return self.objective.state()
