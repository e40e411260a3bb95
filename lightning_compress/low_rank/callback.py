"""Low rank as a callback: layers become products of thin ones before the fit, and the optimizer trains the factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.given import whole_number
from lightning_compress.low_rank.costs import Cost
from lightning_compress.low_rank.replace import KIND, LowRankReport, plan_low_rank
from lightning_compress.low_rank.sites import Method
from lightning_compress.low_rank.wanted import Wanted
from lightning_compress.replacement.plan import Plan
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.effects import Effects
from lightning_compress.trainer.replacing import ReplacingCallback
from lightning_compress.trainer.settings import settings_of


class LowRankCallback(ReplacingCallback):
    """Replaces layers by products of thin ones before the optimizers are made, so that they train the factors.

    A linear layer of rank r becomes two, to r features and from them to the outputs; an embedding likewise, and the
    output matrix of its weight with it. A convolution becomes the cheapest for what it loses of three splits. The
    factors are those that change the outputs of each layer least on the first training batches, and one budget is spent
    over all layers. A layer that would not get cheaper stays, and the log says why. State dicts, checkpoints and
    compressed files say what was replaced, and `load_compressed` replaces it in a network of the dense class.

    Args:
        rank: The rank of every layer, or {pattern: rank}; of Tucker splits both ranks.
        energy: Instead: the share of the variance of each layer's outputs that stays, above 0 to 1.
        budget: Instead: the share of the network's cost that stays. Where none of the three is given, half.
        cost: "parameters"; "macs": multiply-accumulates; "latency": seconds, measured on this machine.
        method: "auto", or the only split that convolutions with a kernel may take: "channel", "spatial" or "tucker".
        data: None: the first training batches say what layers read; "none": nothing does, which is plain SVD.
        target: Names of layers, or glob patterns; by default all.
        exclude: Names of layers that stay, or glob patterns.
        n_batches: How many training batches are read, on all ranks together.
        network: Dotted path of the submodule whose layers are replaced.
        example_inputs: Inputs to run the network with: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments, batch first. By default `example_input_array`, else one peeked batch.

    Raises:
        ValueError: An argument is out of range.

    References:
        Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks for Classification and Detection"; Jaderberg
        et al. 2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions"; Kim et al. 2016, "Compression
        of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications".

    Example:
        >>> from lightning.pytorch import Trainer
        >>> low_rank = LowRankCallback(budget=0.4, cost="macs")
        >>> trainer = Trainer(callbacks=[low_rank], max_epochs=3, logger=False, enable_checkpointing=False)
    """

    kind: ClassVar[str] = KIND

    def __init__(
        self,
        rank: int | Mapping[str, int] | None = None,
        *,
        energy: float | None = None,
        budget: float | None = None,
        cost: Cost = "parameters",
        method: Method = "auto",
        data: Literal["none"] | None = None,
        target: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        n_batches: int = 16,
        network: str = "",
        example_inputs: Any = None,
    ) -> None:
        super().__init__(**settings_of(locals()))
        self.wanted = Wanted(rank, energy, budget, cost, method)
        if data not in (None, "none"):
            raise ValueError(f'data must be None, for training batches, or "none", for plain SVD; got {data!r}.')
        whole_number(n_batches, "n_batches must be a whole number, 1 or more", least=1)
        self.target = target
        self.exclude = exclude
        self.n_batches = 0 if data == "none" or self.idle else n_batches
        self.network = network
        self.example_inputs = example_inputs
        self.report: LowRankReport | None = None

    @property
    def idle(self) -> bool:
        """Whether all of the network's cost may stay, so that nothing is replaced."""
        return self.wanted.budget == 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.idle:
            CompressionCallback.setup(self, trainer, pl_module, stage)
        else:
            super().setup(trainer, pl_module, stage)

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        return Effects() if self.idle else super().effects(trainer, pl_module)

    def plan(self, network: nn.Module, example_inputs: ExampleInputs, batches: Sequence[ExampleInputs]) -> Plan:
        self.report, plan = plan_low_rank(
            network,
            example_inputs,
            self.wanted,
            batches=batches if self.n_batches else None,
            target=self.target,
            exclude=self.exclude,
        )
        return plan
