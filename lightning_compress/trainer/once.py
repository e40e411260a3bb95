"""Base class of the callbacks that quantize all weights at once, at one moment of the fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from lightning_compress.core.schedule import checked_epoch
from lightning_compress.core.select import refuse_complex, select_parameters
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.effects import Effects, Kind, Progress
from lightning_compress.trainer.monitors import count_anew
from lightning_compress.trainer.steps import steps_at


class QuantizingCallback(CompressionCallback):
    """A callback that quantizes all weights at once, at `start_epoch`, and trains on.

    A subclass supplies `begin`, the class attributes and, if `target` alone does not select its parameters, `wants`.
    Its `prepare` and `technique_state` extend those of this class. It has begun once `self.projection` is set.

    Args:
        start_epoch: The epoch at which it begins, which may be a fraction.
        target: Patterns of modules (their `weight`) or parameters.
        exclude: Patterns to leave out.
        settings: The other constructor arguments, for the `state_key`.
    """

    verb: ClassVar[str]  # infinitive of the operation, for messages: "binarize"
    done: ClassVar[str]  # state of the weights afterwards, for messages: "binary"
    kind: ClassVar[Kind]  # kind of the values, for `Effects.values`

    def __init__(
        self,
        *,
        start_epoch: float,
        target: str | Sequence[str] | None,
        exclude: str | Sequence[str],
        **settings: Any,
    ) -> None:
        start_epoch = checked_epoch(start_epoch)
        super().__init__(**settings, start_epoch=start_epoch, target=target, exclude=exclude)
        self.start_epoch = start_epoch
        self.target = target
        self.exclude = exclude

        self._start: int | None = None  # the optimizer step at which it begins
        self._wanted: Collection[str] = ()
        self._idle = True  # the patterns select nothing

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Quantize the weights and set `self.projection`; return the reason that monitors give for counting anew."""
        raise NotImplementedError(f"{type(self).__name__} must supply begin().")

    def wants(self, pl_module: LightningModule) -> Collection[str]:
        """Return the names of the parameters to quantize."""
        return select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude)

    def inputs_of(self, pl_module: LightningModule) -> Collection[str]:
        """Return the names of the layers whose inputs to quantize."""
        return ()

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        values, inputs = dict.fromkeys(self.wants(pl_module), self.kind), frozenset(self.inputs_of(pl_module))
        begins = None if trainer is None else self._planned(trainer, self.loaded_state)
        return replace(self.shared_effects(), values=values, inputs=inputs, begins=begins, final=begins)

    def shared_effects(self) -> Effects:
        """Return the effects that follow from the settings alone."""
        return Effects()

    def progress(self) -> Progress:
        begun = self.projection is not None
        return Progress(fraction=float(begun), finished=begun or self._idle, numbers=self.numbers())

    def numbers(self) -> dict[str, Callable[[], float]]:
        """Return the numbers to log at an epoch's end, as in `Progress.numbers`."""
        return {}

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self._wanted = self.wants(pl_module)
        refuse_complex(pl_module, self._wanted, self.name)
        self._idle = not self._wanted and not self.inputs_of(pl_module)
        self._start = self._planned(trainer, state)

    def _planned(self, trainer: Trainer, state: dict[str, Any] | None) -> int:
        """Return the optimizer step to begin at: that of a checkpoint, of an earlier fit, or of this fit's plan."""
        start: int | None = self._start if state is None else state["start"]
        return steps_at(trainer, self.start_epoch) if start is None else start

    def follow_epochs(self, trainer: Trainer, moment: Callable[[int], int]) -> None:
        assert self._start is not None
        self._start = moment(self._start)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        assert self._start is not None
        if self.projection is not None or self._idle or step < self._start:
            return
        reason = self.begin(trainer, pl_module)
        if step > 0:
            count_anew(trainer, reason)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self._idle and self.projection is None:
            warnings.warn(
                f"The fit ended at step {self._steps}, before weights were {self.done} at step {self._start}: "
                f"use an earlier start_epoch than {self.start_epoch}, or train longer.",
                stacklevel=2,
            )

    def technique_state(self) -> dict[str, Any]:
        return {"start": self._start}
