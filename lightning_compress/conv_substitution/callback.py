"""A callback that replaces convolutions by blocks of cheaper ones before the optimizers are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from lightning_compress.conv_substitution.substitute import (
    KIND,
    Block,
    Init,
    Patterns,
    Wanted,
    plan_substitution,
)
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.given import whole_number
from lightning_compress.core.recalibrate import recalibrate, tracks
from lightning_compress.replacement.plan import Plan
from lightning_compress.trainer.replacing import ReplacingCallback
from lightning_compress.trainer.settings import settings_of


class ConvSubstitutionCallback(ReplacingCallback):
    """Convolutions become blocks of cheaper ones, close to what they compute, before a fit's first step.

    What a block is, `conv_substitution/blocks.py` says. The fit starts from the weights that the module has, so train
    it first, or load it. A resumed fit, and `trainer.test(ckpt_path=...)`, rebuild the blocks from the checkpoint.

    Args:
        block: What convolutions become: "separable", "xception", "fire", "ghost" or "shuffle".
        init: How blocks begin. "data": fitted by least squares to what the layers compute for training batches; "svd":
            to their weights alone; "random": torch's initialisation.
        multiplier: Of separable and xception: how many pairs of a depthwise and a pointwise convolution.
        squeeze: Of fire: the squeezed channels, as a share of the outputs.
        ratio: Of ghost: 1 / ratio of the outputs are computed, and the others made of these.
        groups: Of shuffle: of its 1x1 convolutions.
        target: Names of layers, or glob patterns; () names none. By default all convolutions but those with up to four
            input channels. Those that a block can't stand in for, or that it would not make smaller, stay, and a
            message says why.
        exclude: Names of layers that stay, or glob patterns.
        n_batches: Training batches for the fits and for the statistics of batch norms, on all ranks together; 0: norms
            keep their statistics, with "svd" and "random".
        network: Dotted path of the submodule whose convolutions are replaced; by default the module itself.
        example_inputs: Inputs to run the network with: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments, batch first. By default `example_input_array`, else one peeked batch.

    Raises:
        ValueError: An argument is out of range.

    References:
        Guo et al. 2018, "Network Decoupling"; Howard et al. 2017, "MobileNets"; Chollet 2016, "Xception"; Iandola et
        al. 2016, "SqueezeNet"; Han et al. 2019, "GhostNet"; Zhang et al. 2017, "ShuffleNet".

    Example:
        >>> from lightning.pytorch import Trainer
        >>> blocks = ConvSubstitutionCallback("separable", exclude="network.stem.*")
        >>> trainer = Trainer(callbacks=[blocks], max_epochs=6, logger=False, enable_checkpointing=False)
    """

    kind: ClassVar[str] = KIND

    def __init__(
        self,
        block: Block = "separable",
        *,
        init: Init = "data",
        multiplier: int = 1,
        squeeze: float = 0.125,
        ratio: int = 2,
        groups: int = 2,
        target: Patterns | None = None,
        exclude: Patterns = (),
        n_batches: int = 8,
        network: str = "",
        example_inputs: Any = None,
    ) -> None:
        super().__init__(**settings_of(locals()))
        self.wanted = Wanted(block, init, multiplier, squeeze, ratio, groups)
        least = 1 if init == "data" else 0
        whole_number(n_batches, f"n_batches must be a whole number, {least} or more with init={init!r}", least=least)
        self.target = target
        self.exclude = exclude
        self.n_batches = n_batches
        self.network = network
        self.example_inputs = example_inputs

    def plan(self, network: nn.Module, example_inputs: ExampleInputs, batches: Sequence[ExampleInputs]) -> Plan:
        found = plan_substitution(
            network, example_inputs, self.wanted, batches=batches, target=self.target, exclude=self.exclude
        )
        return found.plan

    def finish(self, network: nn.Module, batches: Sequence[ExampleInputs]) -> None:
        if self._plan is None or not self._plan.replacements or not self.n_batches:
            return
        norms = [one for one in network.modules() if tracks(one)]
        before = [{name: buffer.clone() for name, buffer in one.named_buffers()} for one in norms]

        def undo() -> None:
            for norm, buffers in zip(norms, before, strict=True):
                norm.load_state_dict(buffers, strict=False)

        self._undo.append(undo)
        recalibrate(network, batches, batches=max(1, len(batches)), frozen=False)
