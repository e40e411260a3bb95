"""Training from scratch as a callback: the structure of a pruned network, with new weights, before the optimizers."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, suppress
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_compress.coding.checkpoints import adopt
from lightning_compress.core.distributed import broadcast, on_all_ranks
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.masking import bit_mask, keep_
from lightning_compress.core.projection import Projection
from lightning_compress.core.records import records
from lightning_compress.core.structure import follow
from lightning_compress.core.tensors import Kept, saved_tensors, sliced
from lightning_compress.core.undo import as_before_on_error
from lightning_compress.measure.macs import count_macs
from lightning_compress.scratch.structure import Mask, masks_of, new_weights, random_masks, read_structure
from lightning_compress.trainer import rng
from lightning_compress.trainer.averages import averaged_modules
from lightning_compress.trainer.before_optimizers import before_optimizers, is_resumed
from lightning_compress.trainer.callback import techniques
from lightning_compress.trainer.compatibility import check_early
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.inputs import inputs_on_device, resolve_network
from lightning_compress.trainer.settings import settings_of
from lightning_compress.trainer.surgery import CuttingCallback
from lightning_compress.trainer.unwrap import innermost

Budget = Literal["epochs", "computation"]
_raised: WeakKeyDictionary[Trainer, tuple[int | None, int]] = WeakKeyDictionary()  # limits


class ScratchCallback(CuttingCallback):
    """Gives a network the structure of a pruned one, and new random weights, before the optimizers are made.

    The structure is what the file's network has: channels that were cut, layers that were replaced, blocks that have
    left, and weights that are zero, which stay zero. This is the control of every pruning: whether the weights that it
    left were worth anything, or only where they are.

    Args:
        structure: A run's compressed.ckpt, or a file of `save_compressed`; None: nothing happens.
        budget: "epochs" trains for as many epochs as the Trainer says (Scratch-E). "computation" raises the Trainer's
            `max_epochs` and `max_steps`, before schedules are planned by them, by the multiply-accumulates of the dense
            network over those of the thin one, and by 2 where weights are masked (Scratch-B).
        mask: "same" keeps the zeros where they are; "random" draws as many in each layer anew.
        reset: Name of a method of the module that draws all weights anew. By default each layer's `reset_parameters`
            does it, which knows how many inputs a thin layer has.
        network: Dotted path of the submodule whose multiply-accumulates count.
        example_inputs: Inputs to count them with: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments, batch first. By default `example_input_array`, else one peeked batch.

    Raises:
        ValueError: An argument is out of range.

    References:
        Liu et al. 2019, "Rethinking the Value of Network Pruning", section 3.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> scratch = ScratchCallback("runs/pruned/compressed.ckpt", budget="computation")
        >>> trainer = Trainer(callbacks=[scratch], max_epochs=3, logger=False, enable_checkpointing=False)
    """

    replaces_early = True

    def __init__(
        self,
        structure: str | os.PathLike[str] | None,
        *,
        budget: Budget = "epochs",
        mask: Mask = "same",
        reset: str = "",
        network: str = "",
        example_inputs: Any = None,
    ) -> None:
        structure = None if structure is None else os.fspath(structure)
        super().__init__(**settings_of(locals()))
        for name, value, known in (("budget", budget, get_args(Budget)), ("mask", mask, get_args(Mask))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        self.structure = structure
        self.budget: Budget = budget
        self.mask: Mask = mask
        self.reset = reset
        self.network = network
        self.example_inputs = example_inputs
        self.removes = structure is not None
        self.masks: dict[str, Tensor] = {}
        self.times = 1.0  # how many times as many epochs as the Trainer said
        self._left = 1.0  # the share of the parameters
        self._began = False
        self._bits: dict[str, Tensor] = {}
        self._parameters: dict[str, Any] = {}
        self._guard: AbstractContextManager[None] | None = None  # restores the module if the fit is refused
        self._limits: tuple[Any, Any] | None = None  # likewise the Trainer's limits

    # ------------------------------------------------------------------ before the optimizers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.structure is None:
            return
        follow(pl_module)  # the module gets the layers of loaded checkpoints
        if stage == "fit":
            before_optimizers(trainer, self, before=lambda: None, after=lambda: self._begin(trainer, pl_module))

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_resumed(trainer):
            if self.loaded_state is None:
                raise ValueError(
                    f"The checkpoint {trainer.ckpt_path} is of a fit without {self.name}, or was saved with "
                    f"save_weights_only=True: weights are drawn anew in a new fit alone. Start one without ckpt_path."
                )
            self._lengthen(trainer, self.loaded_state["times"])
            return
        if self._began:
            rank_zero_info(f"{self.name}: the fit goes on with the structure and the weights of the one before.")
            return
        self._check_limits(trainer)
        check_early(trainer, pl_module)
        states = rng.capture()
        self._guard = as_before_on_error(innermost(pl_module), values=True)
        self._guard.__enter__()
        try:
            self._build(trainer, pl_module)
        finally:
            rng.restore(states)

    def _check_limits(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop
        if self.budget == "computation" and not _limited(loop.max_epochs) and not _limited(loop.epoch_loop.max_steps):
            raise ValueError(
                f"{self.name}(budget='computation') raises the Trainer's limits, and it has none: "
                f"max_epochs={loop.max_epochs}, max_steps={loop.epoch_loop.max_steps}. Give it max_epochs."
            )

    def _build(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.model_to_device()
        own = innermost(pl_module)
        dense, parameters = self._macs(pl_module), _count(own)
        on_all_ranks(lambda: self._adopt(own))
        thin = self._macs(pl_module)
        self.masks = masks_of(own)
        left = _count(own)
        self._left = left / parameters
        if left == parameters and not self.masks and not _replaced(own):
            raise ValueError(
                f"{self.structure} holds a network without zeros, all of whose layers are as large as those of "
                f"{type(own).__name__}: there is no structure to train from scratch. Give the file of a pruned network."
            )
        if self.mask == "random":
            if not self.masks:
                raise ValueError(f"mask='random' draws zeros anew, and {self.structure} holds none: use mask='same'.")
            self.masks = random_masks(self.masks, self.generator)
        self.masks = {name: broadcast(mask.contiguous()) for name, mask in self.masks.items()}
        on_all_ranks(lambda: new_weights(own, self.reset))
        self.project_copy(own)
        for tensor in saved_tensors(own).values():
            tensor.data.copy_(broadcast(tensor.data.contiguous()))
        for copy in averaged_modules(trainer):
            adopt(copy, own.state_dict(), "the module")
        times = dense / max(thin, 1) * (2.0 if self.masks else 1.0) if self.budget == "computation" else 1.0
        self._lengthen(trainer, times)
        zeros = sum(int((~mask).sum()) for mask in self.masks.values())
        rank_zero_info(
            f"{self.name}: new weights in the structure of {self.structure}, {left:,} of {parameters:,} parameters, "
            f"{zeros:,} of which stay zero. The fit ends after {trainer.max_epochs} epochs"
            + (f", {times:.3g} times as many as asked for." if self.budget == "computation" else ".")
        )

    def _adopt(self, own: LightningModule) -> None:
        assert self.structure is not None
        adopt(own, read_structure(self.structure), self.structure)

    def _macs(self, pl_module: LightningModule) -> int:
        if self.budget == "epochs":
            return 1
        network = resolve_network(pl_module, self.network)
        inputs = on_all_ranks(lambda: inputs_on_device(pl_module, network, self.example_inputs))
        with evaluating(network):
            return count_macs(network, inputs)[0]

    def _lengthen(self, trainer: Trainer, times: float) -> None:
        self.times = times
        if trainer.fast_dev_run or times == 1:  # type: ignore[attr-defined]  # set by a connector
            return
        loop = trainer.fit_loop
        if _raised.get(trainer) == (loop.max_epochs, loop.epoch_loop.max_steps):
            return  # an earlier fit of this Trainer, which is resumed now
        self._limits = loop.max_epochs, loop.epoch_loop.max_steps
        if loop.max_epochs is not None and _limited(loop.max_epochs):
            loop.max_epochs = max(1, round(loop.max_epochs * times))
        if _limited(loop.epoch_loop.max_steps):
            loop.epoch_loop.max_steps = max(1, round(loop.epoch_loop.max_steps * times))
        _raised[trainer] = loop.max_epochs, loop.epoch_loop.max_steps

    # ------------------------------------------------------------------ the fit

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        if self.structure is None:
            return Effects()
        known = self.masks if self.loaded_state is None else self.loaded_state["masks"]
        return Effects(values=dict.fromkeys(known, "zeros"), replaces_layers=True, reads_structure=True, final=0)

    def progress(self) -> Progress:
        numbers = {"sparsity": self._sparsity} if self.masks else {"parameters_left": lambda: self._left}
        return Progress(fraction=float(self._began), numbers=numbers)

    def _sparsity(self) -> float:
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(int((~mask).sum()) for mask in self.masks.values()) / total

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.masks, self._left = state["masks"], state["left"]
        self._hold(pl_module)

    def _hold(self, pl_module: LightningModule) -> None:
        """Put the masks in force."""
        found = dict(pl_module.named_parameters())
        self._parameters = {name: found[name] for name in self.masks}
        self.masks = {name: mask.to(found[name].device) for name, mask in self.masks.items()}
        self._bits = {name: bit_mask(mask, found[name].dtype) for name, mask in self.masks.items()}
        if self.masks:
            self.projection = Projection(self._parameters, self._zero, keep_latent=False)
            self.projection.rewrite()

    def _zero(self, tensors: Any) -> None:
        for name, tensor in tensors.items():
            keep_(tensor, self._bits[name])

    def before_first_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for other in techniques(trainer):
            other.zero_latent(self.masks)
        super().before_first_step(trainer, pl_module)
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
        self._began, self._guard, self._limits = self.structure is not None, None, None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.precision == "16-mixed":
            self._mask_gradients()  # before the scaler looks for infinite gradients, and skips the step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        """Zero the gradients of masked entries, which must not count where clipping or an optimizer takes a norm."""
        for name, bits in self._bits.items():
            if (gradient := self._parameters[name].grad) is not None:
                keep_(gradient, bits)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._limits is not None:
            trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = self._limits
        if self._guard is not None:  # the fit was refused before its first step
            own = innermost(pl_module)
            kind = next((one.dtype for one in own.parameters() if one.is_floating_point()), None)
            with suppress(type(exception)):
                self._guard.__exit__(type(exception), exception, exception.__traceback__)
            own.to(kind)
            self.masks, self._bits, self.projection = {}, {}, None
        self._guard = self._limits = None

    # ------------------------------------------------------------------ checkpoints, cuts, and averages

    def technique_state(self) -> dict[str, Any]:
        return {"masks": self.masks, "times": self.times, "left": self._left}

    def project_copy(self, module: nn.Module) -> None:
        copies = dict(module.named_parameters())
        for name, mask in self.masks.items():
            if name in copies:
                copies[name].data.masked_fill_(~mask.to(copies[name].device), 0.0)

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule, kept: Kept) -> None:
        if self._began:
            self.masks = sliced(self.masks, kept)
            self._hold(pl_module)


def _limited(limit: int | None) -> bool:
    return limit is not None and limit >= 0


def _count(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def _replaced(module: nn.Module) -> bool:
    return bool(records(getattr(module.state_dict(), "_metadata", None)))
