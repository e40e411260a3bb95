"""Binary weights as a callback: the network computes with signs, and the optimizer trains latent real weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_compress.binary.inputs import (
    binarize_inputs,
    check_scalable,
    has_binary_inputs,
    layers_with_signs,
)
from lightning_compress.binary.signs import LRScale, Mode, Scaling, check_binary, checked_clip, holds_signs
from lightning_compress.binary.weights import BinaryWeights
from lightning_compress.core.by_channel import transposed_groups
from lightning_compress.core.distributed import broadcast
from lightning_compress.core.input_hooks import InputHooks
from lightning_compress.core.select import refuse_sparse_gradients, select_parameters
from lightning_compress.trainer.effects import Effects
from lightning_compress.trainer.latent import LatentCallback
from lightning_compress.trainer.settings import settings_of
from lightning_compress.trainer.targets import unused_layers


class BinaryWeightsCallback(LatentCallback):
    """Trains a network whose weights are -1 and +1, or -a and +a with one number a per output channel.

    Between steps the module holds binary weights W~, and gradients are taken with respect to W~. The optimizer steps
    the latent real weights w, which are then clipped. With mode="deterministic", W~ = sign(w). With mode="stochastic",
    W~ = +1 with probability clip((w + 1) / 2, 0, 1), else -1: a sample drawn anew at every step, the same on all ranks.
    Validation, checkpoints and the end of the fit have sign(w) in both modes. With scaling="mean", W~ = alpha_c
    sign(w), where alpha_c is the mean of |w| over the output channel. Weights that are exactly zero at `start_epoch` or
    become zero later count as pruned: they stay zero, and the network is ternary. Once an epoch the callback logs
    `compress/saturated`, the fraction of real weights that have reached the clip.

    Biases, norms and what `exclude` matches stay real. A binary layer should be followed by a norm, because its outputs
    are large. With `activations`, the first and the last layer are usually excluded.

    Args:
        mode: "deterministic" or "stochastic".
        scaling: "none", or "mean" for XNOR-Net's scales; the gradient then includes the derivative of the scales.
        activations: Whether layers compute with the signs of their inputs; the gradient is then 1 for |x| <= 1 and 0
            elsewhere. True: all targeted layers except the network's first. Patterns: the targeted layers that they
            match. With scaling="mean" the outputs are multiplied by the mean magnitude of the inputs. A layer whose
            inputs are never negative is refused in training. For a network in another process call `binarize_inputs`.
        clip: The real weights are clipped to -clip .. clip; None: they are not clipped.
        lr_scale: "glorot" divides every update of the real weights by sqrt(1.5 / (fan_in + fan_out)). The optimizer's
            result is divided, so this acts with Adam as well.
        start_epoch: When the weights become binary, in epochs; fractions are allowed.
        target: Patterns of modules (their `weight`) or parameters; by default the linear layers and convolutions that
            an optimizer trains when the fit begins and that the code of `forward` reaches.
        exclude: Patterns of what stays real.

    Raises:
        ValueError: An argument is out of range, or scaling="mean" is combined with mode="stochastic".

    References:
        Courbariaux et al. 2015, "BinaryConnect", section 2; Courbariaux et al. 2016, "Binarized Neural Networks",
        section 1; Rastegari et al. 2016, "XNOR-Net", section 3.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> binary = BinaryWeightsCallback(scaling="mean", exclude=["*conv1", "*fc"])
        >>> trainer = Trainer(callbacks=[binary], max_epochs=9, logger=False, enable_checkpointing=False)
    """

    verb, done = "binarize", "binary"
    kind = "signs"

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
        clip = checked_clip(clip)
        super().__init__(**settings_of(locals()))
        check_binary(mode, scaling, lr_scale)
        self.mode: Mode = mode
        self.scaling: Scaling = scaling
        self.activations = activations
        self.clip = clip
        self.lr_scale: LRScale = lr_scale

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        # Rank 0's seed makes all ranks draw the same samples.
        seed = torch.tensor(torch.initial_seed() % 2**63, device=pl_module.device)
        self.generator.manual_seed(int(broadcast(seed)))
        super().prepare(trainer, pl_module, state)
        if self.scaling == "mean":
            refuse_sparse_gradients(pl_module, self._wanted, f"{self.name}(scaling='mean')")
            check_scalable(pl_module, self.inputs_of(pl_module))
        if state is not None:
            self.generator.set_state(state["generator"].cpu())

    def make_weights(self, pl_module: LightningModule) -> BinaryWeights:
        return BinaryWeights(
            pl_module,
            list(self._wanted),
            mode=self.mode,
            scaling=self.scaling,
            clip=self.clip,
            lr_scale=self.lr_scale,
            generator=self.generator,
        )

    def hook_inputs(self, pl_module: LightningModule) -> InputHooks | None:
        if not self.activations:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # patterns that match nothing have been warned about already
            return binarize_inputs(
                pl_module,
                activations=self.activations,
                target=self.patterns(pl_module),
                exclude=self.exclude,
                scale=self.scaling == "mean",
                unused=unused_layers(pl_module),
            )

    def inputs_of(self, pl_module: LightningModule) -> Collection[str]:
        wanted = select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude, warn=False)
        return layers_with_signs(pl_module, self.activations, wanted, unused_layers(pl_module))

    def shared_effects(self) -> Effects:
        return Effects(options={"inputs": f"activations={self.activations!r}"})

    def numbers(self) -> dict[str, Callable[[], float]]:
        return {"saturated": self._weights.saturated} if isinstance(self._weights, BinaryWeights) else {}

    def technique_state(self) -> dict[str, Any]:
        return super().technique_state() | {"generator": self.generator.get_state()}

    def shows_what_trains(self) -> bool:
        return self.mode == "deterministic"

    # ------------------------------------------------------------------ binary inputs outside of a fit

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready_inputs(trainer, pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready_inputs(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready_inputs(trainer, pl_module)

    def _ready_inputs(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the hooks for binary inputs on a module that was not fitted in this process."""
        if trainer.state.fn == "fit" or not self.activations or any(map(has_binary_inputs, pl_module.modules())):
            return
        wanted = select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude)
        if holds_signs(wanted, transposed_groups(pl_module)):
            self._inputs = self.hook_inputs(pl_module)
        else:
            warnings.warn(
                f"The weights of {', '.join(wanted)} are not all binary, so the inputs of layers stay real. For binary "
                f"inputs load a checkpoint from after start_epoch={self.start_epoch}.",
                stacklevel=2,
            )
