"""Base class of callbacks that quantize weights all at once, at one moment of the fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from lightning_compress.core.select import refuse_complex, select_parameters
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.effects import Effects, Kind, Progress
from lightning_compress.trainer.monitors import count_anew
from lightning_compress.trainer.steps import steps_at


class QuantizingCallback(CompressionCallback):
    """A callback that quantizes weights all at once, at `start_epoch`, and trains them on.

    A subclass supplies `begin`, the class attributes and, where its patterns mean more, `wants`; its `prepare` and
    `technique_state` go on from those here. It has begun when `self.projection` is there.

    Args:
        start_epoch: When it begins, in epochs, which may be fractions.
        target: Patterns of modules (their `weight`) or parameters.
        exclude: Patterns to leave out.
        settings: The other constructor arguments, for the `state_key`.
    """

    verb: ClassVar[str]  # what it does with weights, in messages,
    done: ClassVar[str]  # and what they are afterwards
    kind: ClassVar[Kind]  # of the values

    def __init__(
        self,
        *,
        start_epoch: float,
        target: str | Sequence[str] | None,
        exclude: str | Sequence[str],
        **settings: Any,
    ) -> None:
        start_epoch = float(start_epoch)
        super().__init__(**settings, start_epoch=start_epoch, target=target, exclude=exclude)
        if not start_epoch >= 0:
            raise ValueError(f"start_epoch must be 0 or later; got {start_epoch!r}.")
        self.start_epoch = start_epoch
        self.target = target
        self.exclude = exclude

        self._start: int | None = None  # the optimizer step
        self._wanted: Collection[str] = ()
        self._idle = True  # nothing is wanted

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Quantize the weights and set `self.projection`; return the reason that monitors give for counting anew."""
        raise NotImplementedError

    def wants(self, pl_module: LightningModule) -> Collection[str]:
        """Return the names of the parameters that get a few values."""
        return select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude)

    def inputs_of(self, pl_module: LightningModule) -> Collection[str]:
        """Return the names of the layers whose inputs are changed."""
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
        """Return what is logged at an epoch's end: as `Progress.numbers`."""
        return {}

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self._wanted = self.wants(pl_module)
        refuse_complex(pl_module, self._wanted, self.name)
        self._idle = not self._wanted and not self.inputs_of(pl_module)
        self._start = self._planned(trainer, state)

    def _planned(self, trainer: Trainer, state: dict[str, Any] | None) -> int:
        """The optimizer step at which a resumed fit, an earlier one, or this one begins."""
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
                f"start_epoch={self.start_epoch} is too late.",
                stacklevel=2,
            )

    def technique_state(self) -> dict[str, Any]:
        return {"start": self._start}
