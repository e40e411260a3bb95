"""Quantization-aware training as a callback: weights and inputs are quantized, and latent real weights are trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_compress.core.distributed import all_reduce_max
from lightning_compress.core.given import real_number
from lightning_compress.core.select import is_weight_layer, select_parameters
from lightning_compress.quantization.grids import Granularity, check_bits, check_granularity
from lightning_compress.quantization.input_grids import InputGrid
from lightning_compress.quantization.observers import ObservedInputs
from lightning_compress.quantization.weights import UniformWeights, bits_by_name
from lightning_compress.trainer.effects import Effects
from lightning_compress.trainer.latent import LatentCallback
from lightning_compress.trainer.settings import settings_of


class QuantizationAwareTrainingCallback(LatentCallback):
    """Trains a network whose weights and layer inputs are quantized to a few bits.

    Weights: between steps the module holds W~ = s_c q with q = clamp(round(w / s_c), -L, L) and L = 2^(b-1) - 1, and
    one scale s_c per output channel. With 6 or more bits s_c = max |w| / L; with fewer bits s_c minimises the squared
    error. Gradients are taken with respect to W~, and the optimizer steps the latent real weights w. Weights that are
    exactly zero at `start_epoch` or become zero later count as pruned: they stay zero.

    Inputs: every targeted layer computes with x~ = s (q - z), q = clamp(round(x / s) + z, 0, 2^b - 1), with one scale s
    and one zero point z per layer. The gradient passes where q was not clamped. The grid covers 0 and a moving average
    of the input's range over the training steps (in training mode, or with gradients), the same on all ranks; it does
    not change outside training. A network that trains at several widths has a grid for each, unless the statistics of
    its norms are recalibrated: then the widths share one. Inputs stay real until the first step after `start_epoch`.
    The hooks stay on the module after the fit. The metadata of the state dict store the grids, so
    `trainer.test(ckpt_path=...)` with this callback, or `load_compressed` without it, restores them.

    Biases, norms and what `exclude` matches stay real. Once an epoch the callback logs `compress/weight_bits` (the
    mean), `compress/clipped` (the fraction of real weights beyond the grid) and `compress/zeros` (the fraction of zero
    weights).

    Args:
        weight_bits: The bits of a weight, 2 to 8; None leaves the weights real. Or `{pattern: bits}`, with patterns as
            in `target`: `{"conv*": 8, "fc*": 4}`. The first pattern that matches a layer counts. The weights and inputs
            of a layer that no pattern matches stay real, with a warning; those of a pattern with None, without one.
        activation_bits: The bits of a layer's input, 2 to 8; None leaves inputs real.
        granularity: "channel" for one scale per output channel; "tensor" for one scale per parameter, which clustered
            weights need.
        smoothing: The factor of the moving average: how much of its old range an input keeps at each step.
        start_epoch: When quantization begins, in epochs; fractions are allowed. Some dense epochs before it help.
        target: Patterns of modules (their `weight`) or parameters. By default: what the patterns of `weight_bits` name;
            without patterns, the linear layers and convolutions that an optimizer trains when the fit begins and that
            the code of `forward` reaches.
        exclude: Patterns of what stays real.

    Raises:
        ValueError: An argument is out of range, or nothing would be quantized.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference" (arXiv 1712.05877), sections 2 and 3; Krishnamoorthi 2018 (1806.08342); Nagel et al. 2021
        (2106.08295).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> qat = QuantizationAwareTrainingCallback({"*conv*": 8, "*fc*": 4}, start_epoch=6.0)
        >>> trainer = Trainer(callbacks=[qat], max_epochs=9, logger=False, enable_checkpointing=False)
    """

    verb, done = "quantize", "quantized"
    kind = "grid"

    def __init__(
        self,
        weight_bits: int | Mapping[str, int | None] | None = 8,
        activation_bits: int | None = 8,
        *,
        granularity: Granularity = "channel",
        smoothing: float = 0.95,
        start_epoch: float = 0.0,
        target: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
    ) -> None:
        weight_bits = dict(weight_bits) if isinstance(weight_bits, Mapping) else weight_bits
        smoothing = real_number(smoothing, "smoothing must be at least 0 and below 1", least=0, below=1)
        super().__init__(**settings_of(locals()))
        if weight_bits == {}:
            raise ValueError("weight_bits={} names no layer. Give {pattern: bits}, or None to leave the weights real.")
        given = list(weight_bits.values()) if isinstance(weight_bits, Mapping) else [weight_bits]
        for bits in given:
            if bits is not None:
                check_bits("weight_bits", bits)
        if all(bits is None for bits in given) and (activation_bits is None or isinstance(weight_bits, Mapping)):
            raise ValueError(
                f"weight_bits={weight_bits!r} with activation_bits={activation_bits!r} quantizes nothing. Give bits "
                f"from 2 to 8 for the weights or the inputs."
            )
        if activation_bits is not None:
            check_bits("activation_bits", activation_bits)
        check_granularity(granularity)
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.granularity: Granularity = granularity
        self.smoothing = smoothing

        self._inputs: ObservedInputs | None = None

    # ------------------------------------------------------------------ what has been reached

    @property
    def input_grids(self) -> dict[str, InputGrid]:
        """The current grids of the inputs, by layer name; empty before the first step after `start_epoch`."""
        hooks = {} if self._inputs is None else self._inputs.hooks
        return {name: grid for name, hook in hooks.items() if (grid := hook.grid) is not None}

    # ------------------------------------------------------------------ what is wanted

    def wants(self, pl_module: LightningModule) -> dict[str, int]:
        if self.weight_bits is None:
            return {}
        return bits_by_name(
            pl_module,
            self.weight_bits,
            target=self.target,
            default=self.patterns(pl_module, named=isinstance(self.weight_bits, Mapping)),
            exclude=self.exclude,
        )

    def inputs_of(self, pl_module: LightningModule) -> Collection[str]:
        if self.activation_bits is None:
            return ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an earlier call of `wants` has warned of layers without a pattern
            named: Collection[str] = self.wants(pl_module)
        if self.weight_bits is None:
            named = select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude)
        wanted = {id(pl_module.get_parameter(name)) for name in named}
        layers = {name: layer for name, layer in pl_module.named_modules() if is_weight_layer(layer)}
        return [name for name, layer in layers.items() if id(layer.weight) in wanted]

    def shared_effects(self) -> Effects:
        return Effects(
            span=self.granularity,
            options={"span": f"granularity={self.granularity!r}", "inputs": f"activation_bits={self.activation_bits}"},
        )

    def numbers(self) -> dict[str, Callable[[], float]]:
        if not isinstance(self._weights, UniformWeights) or not self._weights.latent:
            return {}
        mine = self._weights
        return {"weight_bits": lambda: mine.mean_bits, "clipped": mine.clipped, "zeros": mine.zeros}

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        ranges = {} if self._inputs is None else self._inputs.state_dict()
        super().prepare(trainer, pl_module, state)
        if self._inputs is not None and self._weights is not None:
            self._inputs.load_state_dict(ranges if state is None else state["inputs"])
        elif state is None and (others := self._without_inputs(pl_module)):
            warnings.warn(
                f"The weights of {', '.join(others)} are quantized, but no linear layer or convolution has them as its "
                f"`weight`, so the inputs that meet them stay real.",
                stacklevel=2,
            )

    def make_weights(self, pl_module: LightningModule) -> UniformWeights:
        assert isinstance(self._wanted, dict)
        return UniformWeights(pl_module, self._wanted, granularity=self.granularity)

    def hook_inputs(self, pl_module: LightningModule) -> ObservedInputs | None:
        if self.activation_bits is None:
            return None
        names = list(self.inputs_of(pl_module))
        return ObservedInputs(pl_module, names, self.activation_bits, smoothing=self.smoothing) if names else None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._inputs is not None:
            self._inputs.update(all_reduce_max(self._inputs.seen()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._inputs is not None:
            self._inputs.check_finite()  # first: NaN inputs cause NaN weights, which super() reports
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._inputs is not None:
            self._inputs.observe(False)
            if unseen := self._inputs.unseen():
                warnings.warn(
                    f"The inputs of {', '.join(unseen)} stay real: these layers were not called in training, or only "
                    f"in evaluation mode without gradients. Perhaps another module uses their weights directly.",
                    stacklevel=2,
                )

    def _without_inputs(self, pl_module: LightningModule) -> list[str]:
        """Return the names of quantized parameters that are not the `weight` of a layer with quantized inputs."""
        if self.activation_bits is None:
            return []
        read = {id(pl_module.get_submodule(name).weight) for name in self.inputs_of(pl_module)}
        return [name for name in self._wanted if id(pl_module.get_parameter(name)) not in read]

    # ------------------------------------------------------------------ checkpoints

    def technique_state(self) -> dict[str, Any]:
        return super().technique_state() | {"inputs": {} if self._inputs is None else self._inputs.state_dict()}
