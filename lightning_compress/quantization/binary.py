"""Binary weights as a callback: the network computes with signs, the optimizer trains the real values behind them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.core.select import select_parameters
from lightning_compress.core.slicing import Kept
from lightning_compress.quantization.binary_inputs import BinaryInputs, binarize_inputs, has_binary_inputs
from lightning_compress.quantization.binary_weights import BinaryWeights, LRScale
from lightning_compress.quantization.quantizing import QuantizingCallback
from lightning_compress.quantization.signs import Mode, Scaling, check_binary, holds_signs, transposed_groups
from lightning_compress.trainer.averages import averaged_modules
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.distributed import broadcast
from lightning_compress.trainer.inputs import is_compiled

_BY_VALUE = ("magnitude", "l2", "si")  # pruning criteria, to which all of -1 and +1 are the same


class BinaryWeightsCallback(QuantizingCallback):
    """Trains a network whose weights are -1 and +1, or these times one number per output channel.

    Between steps the module holds binary weights W~; the gradient is taken there, and the optimizer steps, and `clip`
    clips, the real weights w behind them. "deterministic": W~ = sign(w). "stochastic": W~ = +1 with probability
    clip((w + 1) / 2, 0, 1), drawn anew at every step, the same on all ranks; validation, checkpoints and the end of the
    fit have sign(w) all the same. With scaling="mean", W~ = alpha_c sign(w), alpha_c the mean of |w| over the channel.
    Weights that are exactly zero, then or later, have been pruned: they stay zero, so that the others make a ternary
    network. `saturated`, the share of real weights at the clip, is logged once an epoch.

    Biases, norms and what `exclude` names stay real. Outputs of binary layers are large: put norms behind them. With
    `activations`, the first and the last layer are usually excluded.

    Args:
        mode: "deterministic" or "stochastic".
        scaling: "none", or "mean" for XNOR-Net's scales, whose gradient is part of the weights'.
        activations: Whether layers see the signs of their inputs, with the gradient 1 for |x| <= 1 and 0 elsewhere:
            True for all targeted layers but the network's first; patterns for those of them that they name. With
            scaling="mean", their outputs are multiplied with the inputs' mean magnitude. In training a layer whose
            inputs are never negative is refused. `binarize_inputs` does the same to a network in another process.
        clip: Bound of the real weights; None: none.
        lr_scale: "glorot" divides every update of the real weights by sqrt(1.5 / (fan_in + fan_out)), after the
            optimizer and thus with Adam too.
        start_epoch: When weights become binary, in epochs, which may be fractions.
        target: Patterns of modules (their `weight`) or parameters; by default every linear layer and convolution.
        exclude: Patterns to leave out.

    Raises:
        ValueError: An argument is out of range, or the combination makes no sense.

    References:
        Courbariaux et al. 2015, "BinaryConnect", section 2; Courbariaux et al. 2016, "Binarized Neural Networks",
        section 1; Rastegari et al. 2016, "XNOR-Net", section 3.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> binary = BinaryWeightsCallback(scaling="mean", exclude=["*conv1", "*fc"])
        >>> trainer = Trainer(callbacks=[binary], max_epochs=9, logger=False, enable_checkpointing=False)
    """

    verb, done = "binarize", "binary"
    hidden = "of which binary weights keep their own"
    shrunk = "shrinks weights whose signs stay"

    def __init__(
        self,
        mode: Mode = "deterministic",
        *,
        scaling: Scaling = "none",
        activations: bool | str | Sequence[str] = False,
        clip: float | None = 1.0,
        lr_scale: LRScale = "none",
        start_epoch: float = 0.0,
        target: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
    ) -> None:
        clip = None if clip is None else float(clip)
        activations = activations if isinstance(activations, (bool, str)) else list(activations)
        super().__init__(
            mode=mode,
            scaling=scaling,
            activations=activations,
            clip=clip,
            lr_scale=lr_scale,
            start_epoch=start_epoch,
            target=target,
            exclude=exclude,
        )
        check_binary(mode, scaling, lr_scale, clip)
        self.mode: Mode = mode
        self.scaling: Scaling = scaling
        self.activations = activations
        self.clip = clip
        self.lr_scale: LRScale = lr_scale

        self._binary: BinaryWeights | None = None  # is the projection
        self._inputs: BinaryInputs | None = None
        self._averages: dict[str, Tensor] = {}  # while a validation has their signs

    # ------------------------------------------------------------------ what stands behind the signs

    @property
    def latent(self) -> dict[str, Tensor]:
        """The real weights, by parameter name; empty before `start_epoch`."""
        return {} if self._binary is None else self._binary.latent

    @contextmanager
    def real_weights(self, pl_module: LightningModule) -> Iterator[None]:
        """Have the real weights in the module, as for a test of their accuracy, and afterwards again the binary ones.

        Raises:
            ValueError: The module is not the one that was fitted, or holds weights of another moment.
        """
        binary = self._binary
        if binary is None or any(pl_module.get_parameter(name) is not p for name, p in binary.parameters.items()):
            raise ValueError(
                "real_weights: this callback has not made the weights of this module binary. Real weights are known "
                "during and after a fit, or a resume, in the same process."
            )
        if not binary.holds():
            raise ValueError(
                "real_weights: the module no longer holds the signs of this fit's real weights, as after a test with "
                "ckpt_path='best'. Resume from that checkpoint to have its real weights."
            )
        with binary.real():
            yield

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        super().prepare(trainer, pl_module, state)
        self._check_others(trainer, pl_module)
        if self.activations and is_compiled(pl_module):
            raise ValueError(
                "activations work by hooks, which a module compiled before the fit does not see: fit the module itself "
                "and compile it afterwards."
            )
        # All ranks draw the same samples.
        seed = torch.tensor(torch.initial_seed() % 2**63, device=pl_module.device)
        self.generator.manual_seed(int(broadcast(seed)))
        before = None if self._binary is None else self._binary.state_dict()
        if state is not None:
            before = state["binary"]
        elif self._binary is not None and not self._binary.holds():
            raise ValueError(
                "The module no longer holds the binary weights of an earlier fit with this callback. To binarize this "
                "network from the beginning, make a new callback."
            )
        if before is None:
            self._binary = self.projection = None
            if self._inputs is not None:
                self._inputs.remove()
            return
        self._binarize(pl_module).load_state_dict(before)
        if state is not None:
            self.generator.set_state(state["generator"].cpu())
            for average in averaged_modules(trainer):
                _put(average, state.get("averages", {}))

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> str:
        self._check_pruning(trainer, pl_module)
        self._binarize(pl_module)
        return "weights are binary"

    def _binarize(self, pl_module: LightningModule) -> BinaryWeights:
        self._binary = self.projection = BinaryWeights(
            pl_module,
            list(self._wanted),
            mode=self.mode,
            scaling=self.scaling,
            clip=self.clip,
            lr_scale=self.lr_scale,
            generator=self.generator,
        )
        if self.activations:
            self._hook_inputs(pl_module)
        return self._binary

    def _hook_inputs(self, pl_module: LightningModule) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # patterns that match nothing have been told
            self._inputs = binarize_inputs(
                pl_module,
                activations=self.activations,
                target=self.target,
                exclude=self.exclude,
                scale=self.scaling == "mean",
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._binary is not None:
            self._binary.check_finite()
            pl_module.log(f"saturated{self.suffix(trainer)}", self._binary.saturated(), prog_bar=True, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._binary is None:
            return
        for average in averaged_modules(trainer):  # has been put into the module
            self._binary.take_real()
            self.project_copy(average)
        self._binary.show_signs()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._binary is not None and not trainer.validating and self._binary.holds():
            self._binary.show_signs()

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule, kept: Kept) -> None:
        """Slice what is held of tensors that another callback has cut."""
        if self._binary is not None:
            self._binary.follow_cut(pl_module, kept)

    # ------------------------------------------------------------------ validation, checkpoints, averages

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready_inputs(trainer, pl_module)
        if self._validates(trainer):
            self._shown().show_signs()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _ in averaged_modules(trainer) if self._validates(trainer) else ():
            # The average is in the module now. It is put aside and not kept as signs, of which no average is made.
            parameters = dict(pl_module.named_parameters())
            self._averages = {name: parameters[name].detach().clone() for name in self._shown().parameters}
            self.project_copy(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        averages, self._averages = self._averages, {}
        for average in averaged_modules(trainer):
            _put(average, averages)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validates(trainer):
            self._shown().project()

    def _validates(self, trainer: Trainer) -> bool:
        """Whether this is a validation within a fit that trains binary weights."""
        return self._binary is not None and trainer.state.fn == "fit" and not trainer.sanity_checking

    def _shown(self) -> BinaryWeights:
        assert self._binary is not None
        return self._binary

    def _project_averages(self, trainer: Trainer) -> None:
        """Averages stay real: an average that was made of signs every step would never leave its first signs."""

    def project_copy(self, module: nn.Module) -> None:
        if self._binary is not None:
            _put(module, self._binary.signs(dict(module.named_parameters())))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        resuming = self._loaded is not None
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._binary is None or resuming:
            return
        averages: dict[str, Tensor] | None = None
        for average in averaged_modules(trainer):
            parameters = dict(average.named_parameters())
            averages = {name: parameters[name].detach().clone() for name in self._binary.parameters}
            checkpoint["callbacks"][self.state_key]["technique"]["averages"] = averages
        # Signs are there already, or something else was put into the module after the fit.
        if averages is None and (self.mode == "deterministic" or not self._binary.holds()):
            return
        first_name = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        signs = self._binary.signs(averages)
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):
            if first_name[id(parameter)] in signs:
                checkpoint["state_dict"][name] = signs[first_name[id(parameter)]]

    def technique_state(self) -> dict[str, Any]:
        return super().technique_state() | {
            "binary": None if self._binary is None else self._binary.state_dict(),
            "generator": self.generator.get_state(),
        }

    # ------------------------------------------------------------------ binary inputs outside of a fit

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready_inputs(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready_inputs(trainer, pl_module)

    def _ready_inputs(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook a module that was not fitted in this process."""
        if trainer.state.fn == "fit" or not self.activations or any(map(has_binary_inputs, pl_module.modules())):
            return
        wanted = select_parameters(pl_module, self.target, exclude=self.exclude)
        if holds_signs(wanted, transposed_groups(pl_module)):
            self._hook_inputs(pl_module)
        else:
            warnings.warn(
                f"The weights of {', '.join(wanted)} are not all binary, so that the inputs of layers are left as they "
                f"are: load a checkpoint from after start_epoch={self.start_epoch}.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ refusals

    def _check_others(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for other, names in self._beside(trainer, pl_module):
            if getattr(other, "strength", 0.0) > 0:
                raise ValueError(
                    f"{type(other).__name__} pulls groups of {names[0]} to zero, where BinaryWeightsCallback has none "
                    f"but -1 and +1: give them targets that share nothing, or prune in an earlier fit."
                )

    def _check_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for other, names in self._beside(trainer, pl_module):
            criterion, prunes = getattr(other, "criterion", ""), getattr(other, "amount", 0.0) > 0
            stops = getattr(other, "_stop", None) is not None
            if prunes and not getattr(other, "finished", True) and (stops or criterion in _BY_VALUE):
                what = "stop=" if stops else f"criterion={criterion!r}"
                raise ValueError(
                    f"{type(other).__name__}({what}) still prunes {names[0]} when its weights become binary at step "
                    f"{self._start}, and all of them have the same magnitude then: end the pruning sooner (end_epoch), "
                    f"start later (start_epoch), or use another criterion, such as 'taylor', without stop=."
                )

    def _beside(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[CompressionCallback, list[str]]]:
        """Yield the other callbacks that change the same parameters, with these."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if isinstance(other, CompressionCallback) and not isinstance(other, QuantizingCallback):
                target, exclude = getattr(other, "target", None), getattr(other, "exclude", ())
                theirs = select_parameters(pl_module, target, exclude=exclude, warn=False)  # it says so itself
                if both := [name for name in self._wanted if name in theirs]:
                    yield other, both


@torch.no_grad()
def _put(module: nn.Module, values: dict[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)
