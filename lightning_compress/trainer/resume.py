"""Base class of every technique: it refuses strategies, counts steps, and makes a resume exact."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.core.distributed import gather, rank
from lightning_compress.trainer import compatibility, means, rng
from lightning_compress.trainer.effects import DeclaresEffects, Effects
from lightning_compress.trainer.epoch_end import EpochEnd, match_batches
from lightning_compress.trainer.inputs import forget_batch
from lightning_compress.trainer.steps import Pace, epochs_done, steps_done, steps_per_epoch
from lightning_compress.trainer.surroundings import check_namespace, check_strategy
from lightning_compress.trainer.unwrap import innermost

METRICS = "lightning_compress.metrics"  # key in a checkpoint: the logged metrics of every rank, once for all techniques
_REMEDY = "Resume with the version that wrote it, or start a new fit from its weights alone."
# The seed of a fit is often that of the network: unchanged, it would draw the numbers of which the weights were made.
_OWN_NUMBERS = 0x5DEECE66
FORMAT = 2  # version of a technique's state in checkpoints: raise it when the content changes


class ResumableCallback(DeclaresEffects, Callback):
    """A technique that goes on after an interruption as if there had been none.

    A subclass passes its constructor arguments as settings and supplies `prepare`, `at_step` and `technique_state`.
    Every event depends on the number of optimizer steps alone, because this number survives every kind of resume.

    Args:
        settings: The constructor arguments. The `state_key` is made of them, so that one Trainer can have two callbacks
            of one class, and a checkpoint from other settings is recognised.
    """

    def __init__(self, **settings: Any) -> None:
        self.name = type(self).__name__
        self.settings = settings
        self._state_key = self._generate_state_key(**settings)  # made once: the profiler reads it at every hook
        self.generator = torch.Generator()  # its own, so that the network's random numbers stay the same
        self._steps = 0
        self._offset = 0
        self._pace: dict[str, Any] | None = None  # the pace at which the schedule was planned
        self._fitted: weakref.ref[LightningModule] | None = None
        self._loaded: dict[str, Any] | None = None  # the state from a checkpoint, until the fit starts
        self._loads_state = True
        self._resumes = False  # whether a checkpoint was loaded for the fit that starts
        self._metrics: list[dict[str, Any]] | None = None  # of every rank, from it, if this is the first technique
        self._epoch_end: EpochEnd | None = None  # likewise
        self._numbers: dict[str, dict[str, Any]] = {}  # the module's numbers when the fit began

    # ------------------------------------------------------------------ what a technique supplies

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        """Prepare for the first step, and go on from `state` if there is one.

        The module is on its device, and the loaders exist. `state` is the `technique_state` of a checkpoint; if it is
        None, the technique goes on from an earlier fit of this module, if there was one.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply prepare().")

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Act after optimizer step number `step`; 0 is the moment before the first one."""

    def technique_state(self) -> dict[str, Any]:
        """Return the state that a resume needs: tensors, numbers, strings, lists and dicts."""
        raise NotImplementedError(f"{type(self).__name__} must supply technique_state().")

    def follow_epochs(self, trainer: Trainer, moment: Callable[[int], int]) -> None:
        """Move planned steps when an epoch has another number of steps; `moment` maps an old step to a new one."""

    def synchronize(self) -> None:
        """Sum statistics over the ranks before a checkpoint; all ranks call this."""

    # ------------------------------------------------------------------ refusals

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_namespace(trainer, self.name)
        if stage != "fit":
            return
        check_strategy(trainer, self.name)
        self._loaded = self._metrics = self._epoch_end = None  # left by a resume that was refused
        self._resumes = False
        forget_batch(trainer)  # left by an earlier fit
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if any(other is not self and other.state_key == self.state_key for other in callbacks):
            raise ValueError(
                f"The Trainer has two {self.name} with the same settings: {self.state_key}. Leave one out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._numbers = means.numbers(pl_module)

    # ------------------------------------------------------------------ the fit's beginning, and its steps

    @property
    def loaded_state(self) -> dict[str, Any] | None:
        """The `technique_state` of the checkpoint that is resumed, until the fit starts."""
        return None if self._loaded is None else self._loaded["technique"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_first(trainer):
            compatibility.check(trainer, pl_module)  # before any technique prepares
            self._make_up_for_epoch_end(trainer, pl_module)
        loaded, self._loaded = self._loaded, None
        resumes, self._resumes = self._resumes, False
        self._begin_counting(trainer, pl_module, loaded)
        self.generator.manual_seed((torch.initial_seed() + rank()) ^ _OWN_NUMBERS)
        with self._reading(loaded):
            self.prepare(trainer, pl_module, None if loaded is None else loaded["technique"])
        self._keep_pace(trainer, loaded)
        random_state = None if loaded is None else self._random_state(loaded["rng"])
        if random_state is not None:
            self.generator.set_state(random_state["own"].cpu())
        self.before_first_step(trainer, pl_module)
        if loaded is not None and loaded.get("inside_batch", False):
            warnings.warn(
                "The checkpoint was written in the middle of a batch, as after an exception. Lightning goes on "
                "after that batch, with the random states and the statistics of norms of that moment: the run is not "
                "exactly the uninterrupted one. Weights and masks are those from before the batch's step. Resume from "
                "an earlier checkpoint for an exact run.",
                stacklevel=2,
            )
        if random_state is not None:
            rng.restore(random_state["global"])
        if resumes:
            match_batches(trainer)

    def _is_first(self, trainer: Trainer) -> bool:
        """Whether this is the fit's first technique, which does what must happen once for all of them."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        return self is next(one for one in callbacks if isinstance(one, ResumableCallback))

    def _make_up_for_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the logged metrics, and make up for what Lightning leaves out before the first batch."""
        epoch_end, self._epoch_end = self._epoch_end, None
        metrics, self._metrics = self._metrics, None
        if epoch_end is not None:
            inside = trainer.fit_loop.restarted_mid_epoch
            known = means.restore(trainer, pl_module, metrics or [], inside=inside)
            epoch_end.before_training(trainer, metrics_known=known)

    def declared(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        with self._reading(self._loaded):
            found = super().declared(trainer, pl_module)
            if trainer is None:
                return found
            offset = self._offset_in(trainer, self._loaded)
            old, new = self._paces(trainer, self._loaded, steps_done(trainer) + offset)

        def in_this_fit(step: int | None) -> int | None:
            """Convert a planned step, perhaps of an earlier fit, into a step as this Trainer counts."""
            if step is None:
                return None
            if old is not None and new is not None and old.steps_per_epoch != new.steps_per_epoch:
                step = new.step_at(old.epoch_at(step))
            return step - offset

        return replace(found, begins=in_this_fit(found.begins), final=in_this_fit(found.final))

    @contextmanager
    def _reading(self, loaded: dict[str, Any] | None) -> Iterator[None]:
        """Convert the KeyError for a state of another version into a message that names the missing entry."""
        try:
            yield
        except KeyError as error:
            if loaded is None:
                raise
            raise ValueError(
                f"The checkpoint's state of {self.name} has no {error}: it was written by another version of "
                f"lightning_compress, or for another network. {_REMEDY}"
            ) from error

    def before_first_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act before the first step, after `prepare`."""
        self.at_step(trainer, pl_module, self._steps)

    def _keep_pace(self, trainer: Trainer, loaded: dict[str, Any] | None) -> None:
        """Make a schedule follow the epochs where these have another number of steps, as with more devices."""
        old, new = self._paces(trainer, loaded, self._steps)
        if old is not None and new is not None and old.steps_per_epoch != new.steps_per_epoch:
            rank_zero_info(
                f"{self.name}: an epoch has {new.steps_per_epoch} optimizer steps now, and had {old.steps_per_epoch} "
                f"when the schedule was planned, which follows the epochs."
            )
            self.follow_epochs(trainer, lambda step: new.step_at(old.epoch_at(step)))
        self._pace = None if new is None else asdict(new)

    def _paces(
        self, trainer: Trainer, loaded: dict[str, Any] | None, steps: int
    ) -> tuple[Pace, Pace] | tuple[None, None]:
        """Return the pace at which the schedule was planned, and the pace from now on; None if it is unknown."""
        per_epoch, done = steps_per_epoch(trainer), epochs_done(trainer)
        if per_epoch is None:
            return None, None
        before = self._pace if loaded is None else loaded.get("pace")
        old = Pace(step=steps, epoch=done, steps_per_epoch=per_epoch) if before is None else Pace(**before)
        began = old.began if loaded is not None else old.epoch_at(steps) - done
        if old.steps_per_epoch == per_epoch:
            return old, replace(old, began=began)
        return old, Pace(step=steps, epoch=began + done, steps_per_epoch=per_epoch, began=began)

    def _offset_in(self, trainer: Trainer, loaded: dict[str, Any] | None) -> int:
        """Return how many more steps this callback has counted than the Trainer, which counts each fit from 0."""
        if loaded is not None:
            offset: int = loaded["offset"]
            return offset
        return self._offset if self._fitted is None else max(0, self._steps - steps_done(trainer))

    def _begin_counting(self, trainer: Trainer, pl_module: LightningModule, loaded: dict[str, Any] | None) -> None:
        if loaded is None and self._fitted is not None and self._fitted() is not innermost(pl_module):
            raise ValueError(f"This {self.name} has compressed another module in an earlier fit: make a new one.")
        self._offset = self._offset_in(trainer, loaded)
        self._fitted = weakref.ref(innermost(pl_module))
        self._steps = steps_done(trainer) + self._offset

    def __getstate__(self) -> dict[str, Any]:
        # Neither can be pickled for a spawned process; a fit makes both anew.
        return {key: value for key, value in self.__dict__.items() if key not in ("_fitted", "generator")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_fitted": None, "generator": torch.Generator()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = steps_done(trainer) + self._offset
        if step != self._steps:  # with accumulation, batches may end without a step
            self._steps = step
            self.at_step(trainer, pl_module, step)

    # ------------------------------------------------------------------ checkpoints

    @property
    def state_key(self) -> str:
        return self._state_key

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Here and not in `state_dict`, because only this hook knows whether all ranks save together, so that they can
        # gather: after an exception they may not.
        together = trainer.state.status != TrainerStatus.INTERRUPTED
        if together:
            self.synchronize()
        if self._is_first(trainer):
            metrics = means.capture(trainer, pl_module, self._numbers)
            checkpoint[METRICS] = self._metrics or (gather(metrics) if together else [metrics])
        mine = {"global": rng.capture(), "own": self.generator.get_state()}
        batches = trainer.fit_loop.epoch_loop.batch_progress
        checkpoint.setdefault("callbacks", {})[self.state_key] = self._loaded or {
            "format": FORMAT,
            "technique": self.technique_state(),
            "rng": gather(mine) if together else [mine],
            "offset": self._offset,
            "pace": self._pace,
            "inside_batch": batches.current.ready != batches.current.processed,  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._loads_state:
            return
        found = state_dict.get("format", 1)  # format 1 had no number
        if found != FORMAT:
            raise ValueError(
                f"The checkpoint's state of {self.name} has format {found!r}, and this version of lightning_compress "
                f"reads format {FORMAT}. {_REMEDY}"
            )
        self._loaded = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loads_state = trainer.state.fn == "fit"  # Lightning restores callbacks for validate and test as well
        if not self._loads_state:
            return
        states = checkpoint["callbacks"]
        self._resumes = "loops" in checkpoint  # otherwise Lightning refuses the checkpoint
        if self._resumes and self._is_first(trainer):
            self._metrics = checkpoint.get(METRICS)
            lacks = ["logged metrics"] if self._metrics is None else self._metrics[0]["gathered"]
            lacks = [name for name in lacks if name not in means.gathered(pl_module)]
            self._epoch_end = EpochEnd(checkpoint["loops"]["fit_loop"], lacks=lacks)
        if 0 <= trainer.max_steps <= checkpoint["global_step"]:
            warnings.warn(
                f"The checkpoint is from step {checkpoint['global_step']}, and max_steps={trainer.max_steps} leaves "
                f"nothing to train: Lightning skips the fit, and with it the validation and the ends of the epoch "
                f"and of the fit that followed that step in the earlier run. Raise max_steps to go on.",
                stacklevel=2,
            )
        mine = {callback.state_key for callback in trainer.callbacks if type(callback) is type(self)}  # type: ignore[attr-defined]
        others = [key for key in states if key.startswith(type(self).__qualname__ + "{") and key not in mine]
        if self.state_key not in states and others:
            raise ValueError(
                f"The checkpoint was written with other settings: it holds {others[0]}, this run has {self.state_key}. "
                f"Resume with the same settings, or start a new fit from the weights alone."
            )

    def _random_state(self, states: list[dict[str, Any]]) -> dict[str, Any] | None:
        if rank() < len(states):
            return states[rank()]
        warnings.warn(
            f"The checkpoint holds the random states of {len(states)} process(es) and not of rank {rank()}: random "
            f"decisions such as dropout will differ from the uninterrupted run's. Resume with as many processes.",
            stacklevel=2,
        )
        return None
