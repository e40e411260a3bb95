"""Base class of the callbacks that train latent full-precision weights, while the module holds quantized ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.core.input_hooks import InputHooks
from lightning_compress.core.latent import LatentWeights
from lightning_compress.core.structure import follow
from lightning_compress.core.tensors import Kept
from lightning_compress.trainer.averages import averaged_modules
from lightning_compress.trainer.callback import put_values
from lightning_compress.trainer.once import QuantizingCallback
from lightning_compress.trainer.surgery import keep_metadata


class LatentCallback(QuantizingCallback):
    """A callback that trains latent real weights, while the module holds, validates and saves quantized ones.

    A subclass supplies `make_weights`, `hook_inputs` and the class attributes of `QuantizingCallback`. Callbacks of
    Lightning average the quantized weights; the averages stay real until they are projected for validation or saving.
    """

    follows_averages = False

    _weights: LatentWeights | None = None
    _inputs: InputHooks | None = None
    _averages: Mapping[str, Tensor] = {}  # the averages themselves, while a validation uses their projection

    def make_weights(self, pl_module: LightningModule) -> LatentWeights:
        """Make the latent weights, and write their quantized values into the module."""
        raise NotImplementedError(f"{type(self).__name__} must supply make_weights().")

    def hook_inputs(self, pl_module: LightningModule) -> InputHooks | None:
        """Put hooks on the layers whose inputs are quantized; return None if there are none."""
        raise NotImplementedError(f"{type(self).__name__} must supply hook_inputs().")

    # ------------------------------------------------------------------ latent weights

    @property
    def latent(self) -> dict[str, Tensor]:
        """The latent real weights, by parameter name; empty before `start_epoch`."""
        return {} if self._weights is None else self._weights.latent

    @contextmanager
    def real_weights(self, pl_module: LightningModule) -> Iterator[None]:
        """Temporarily restore the full-precision weights, as for a test of their accuracy.

        Raises:
            ValueError: The module is not the one that was fitted, or holds weights of another moment.
        """
        mine = self._weights
        if mine is None or any(pl_module.get_parameter(name) is not p for name, p in mine.parameters.items()):
            raise ValueError(
                f"real_weights: this callback has not made the weights of this module {self.done}. Pass the module "
                f"that it has fitted, during or after the fit in the same process."
            )
        if not mine.holds():
            raise ValueError(
                "real_weights: the module no longer holds the values of this fit's real weights, as after a test with "
                "ckpt_path='best'. Resume from that checkpoint to have its real weights."
            )
        with mine.real():
            yield

    def zero_latent(self, masks: Mapping[str, Tensor]) -> None:
        if self._weights is not None:
            both = masks.keys() & self._weights.latent.keys()
            for name in both:
                self._weights.zero_latent(name, ~masks[name])
            self._weights.rewrite({name: self._weights.parameters[name] for name in both})

    # ------------------------------------------------------------------ the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        follow(pl_module)  # so that a loaded checkpoint restores the hooks on inputs

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        super().prepare(trainer, pl_module, state)
        before = None if self._weights is None else self._weights.state_dict()
        if state is not None:
            before = state["weights"]
        elif self._weights is not None and not self._weights.holds():
            raise ValueError(
                f"The module no longer holds the {self.done} weights of an earlier fit with this callback. To "
                f"{self.verb} this network from the beginning, make a new callback."
            )
        if before is None:
            self._weights = self.projection = None
            if self._inputs is not None:
                self._inputs.remove()
            return
        self._replace(pl_module).load_state_dict(before)
        for average in averaged_modules(trainer):
            _put(average, {} if state is None else state.get("averages", {}))

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> str:
        self._replace(pl_module)
        return f"weights are {self.done}"

    def _replace(self, pl_module: LightningModule) -> LatentWeights:
        self._weights = self.projection = self.make_weights(pl_module)
        if self._inputs is not None:
            self._inputs.remove()
        self._inputs = self.hook_inputs(pl_module)
        return self._weights

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._weights is not None:
            self._weights.check_finite()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._weights is not None:
            for average in averaged_modules(trainer):  # Lightning has copied it into the module
                self._weights.take_real()
                self.project_copy(average)
            self._weights.show()
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._weights is not None and not trainer.validating and self._weights.holds():
            self._weights.show()

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule, kept: Kept) -> None:
        """Slice the state that belongs to tensors which another callback has cut."""
        if self._weights is not None:
            self._weights.follow_cut(pl_module, kept)

    # ------------------------------------------------------------------ validation, checkpoints, averages

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validates(trainer):
            self._begun().show()
        super().on_validation_start(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        for _ in averaged_modules(trainer) if self._validates(trainer) else ():
            # The average is in the module now. Its real values are saved and restored afterwards, because an average
            # that is projected again and again would never change.
            parameters = dict(pl_module.named_parameters())
            self._averages = {name: parameters[name].detach().clone() for name in self._begun().parameters}
            self.project_copy(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        averages, self._averages = self._averages, {}
        for average in averaged_modules(trainer):
            _put(average, averages)

    def _validates(self, trainer: Trainer) -> bool:
        """Whether this is a validation inside a fit, and latent weights train."""
        return self._weights is not None and super()._validates(trainer)

    def _begun(self) -> LatentWeights:
        assert self._weights is not None
        return self._weights

    def _project_averages(self, trainer: Trainer) -> None:
        """Leave averages real until they are validated or saved."""

    def project_copy(self, module: nn.Module) -> None:
        if self._weights is not None:
            _put(module, self._weights.shown(dict(module.named_parameters())))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        resuming = self._loaded is not None
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._weights is None or resuming:
            return
        keep_metadata(checkpoint, pl_module)
        averages: dict[str, Tensor] | None = None
        for average in averaged_modules(trainer):
            parameters = dict(average.named_parameters())
            averages = {name: parameters[name].detach().clone() for name in self._weights.parameters}
            checkpoint["callbacks"][self.state_key]["technique"]["averages"] = averages
        # The module holds these values already, or other code has replaced them after the fit.
        if averages is None and (self.shows_what_trains() or not self._weights.holds()):
            return
        put_values(checkpoint, pl_module, self._weights.shown(averages))

    def shows_what_trains(self) -> bool:
        """Whether training uses the same quantized values as validation and checkpoints."""
        return True

    def technique_state(self) -> dict[str, Any]:
        weights = None if self._weights is None else self._weights.state_dict()
        return super().technique_state() | {"weights": weights}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._weights is not None and self._weights.is_shown:  # a validation has left them there
            self._weights.project()


@torch.no_grad()
def _put(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)
