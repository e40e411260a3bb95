"""Gates of channels as a wrapper: any LightningModule whose samples choose the channels that they use."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from lightning.pytorch import LightningModule

from lightning_compress.channel_gates.kinds import Train, Way, count_at
from lightning_compress.channel_gates.network import ChannelGatedNetwork
from lightning_compress.channel_gates.objective import GatedChannels
from lightning_compress.channel_gates.record import note_gates
from lightning_compress.core.example_inputs import ExampleInputs, to_device, to_type
from lightning_compress.measure.macs import count_macs
from lightning_compress.trainer.compatibility import check_together
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.one_step import backbone
from lightning_compress.trainer.operating_points import OperatingPoint
from lightning_compress.trainer.outline import Outline
from lightning_compress.trainer.unwrap import objective_of, without_trainer
from lightning_compress.trainer.wrapper import CompressionModule, check_wrappable


class ChannelGates(CompressionModule):
    """Have each sample choose, in each layer, the share of the channels that it uses: feature boosting and suppression.

    With s the mean absolute values of the channels that a layer reads, and y what it returns, after its batch norm:

        g = relu(W s + b)        y' = g y for the ceil(d C) channels with the largest g; 0 for the others
        loss' = loss + penalty * (mean over the samples of the sum of all g)

    W is 0 and b is 1 at first, so that a trained network goes on from where it is. In training, d falls linearly from 1
    to `share`; in evaluation it is `share`, so that validation measures the network that is deployed.

    The gates become a part of the network, as its child `channel_gates`: they are saved with it in checkpoints and
    compressed files. The keys of the module's own tensors stay.

    Args:
        module: The LightningModule, whose network should be trained.
        layers: Names of convolutions and linear layers within the network. None: those whose channels go to other
            layers alone, through at most a batch norm and code that maps zeros to zeros; or those that have gates
            already, as from a compressed file. []: no gates.
        share: d, the share of a layer's channels that each sample keeps. None: 0.5, or that of the gates that the
            network has; 1: no gates.
        train: "gradient": the gates learn by the loss's gradient in the gains of the channels that are kept;
            "q_learning" (runtime neural pruning): a small agent in each layer keeps the first 1 to 4 of 4 groups of
            channels, the important ones first, and learns from rewards (see `channel_gates.rewards`) which groups a
            sample needs; `share` is then the mean that a price on channels aims at.
        start_epoch: When the share begins to fall.
        end_epoch: When it has fallen. None: two thirds of the fit.
        penalty: The weight of the gains in the loss, with "gradient".
        network: Dotted path of the submodule whose layers are gated; empty: the module itself.
        output: Key, position or attribute of the logits, where the network returns more; for "q_learning".
        example_inputs: What the network is called with, to find its layers; None: the module's `example_input_array`,
            or else one peeked batch when the fit begins, until which there are no gates, unless a checkpoint brings
            them.

    Raises:
        TypeError: `module` is no LightningModule.
        ValueError: A number out of range; a layer that does not exist or can't be gated, or none that can; a network
            with gates at other layers, or a wrapper inside that does not go with gates.

    Paper:
        Gao et al., Dynamic channel pruning: feature boosting and suppression (1810.05331); Lin et al., Runtime
        neural pruning (2017).

    Example:
        >>> import torch
        >>> from lightning_compress.baselines import Classifier, DigitsConvNet
        >>> module = Classifier(DigitsConvNet(width=8))
        >>> module = ChannelGates(module, network="network", example_inputs=torch.zeros(2, 1, 8, 8))
        >>> [name for name, _ in module.named_parameters() if "channel_gates.1" in name]
        ['network.channel_gates.1.weight', 'network.channel_gates.1.bias']
    """

    __slots__ = ()

    def __init__(
        self,
        module: LightningModule,
        layers: str | Sequence[str] | None = None,
        *,
        share: float | None = None,
        train: Train = "gradient",
        start_epoch: float = 0.0,
        end_epoch: float | None = None,
        penalty: float = 1e-8,
        network: str = "",
        output: str | int | None = None,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        check_wrappable(module, type(self))
        objective = GatedChannels(
            layers,
            share=share,
            train=train,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            penalty=penalty,
            network=network,
            output=output,
            example_inputs=example_inputs,
        )
        found = resolve_network(module, network)
        given = example_inputs if example_inputs is not None else getattr(module, "example_input_array", None)
        if not objective.adopt(found):
            if given is not None:
                objective.build(found, given)
            elif not objective.idle:
                note_gates(backbone(found))
        super().__init__(module, objective)
        check_together(self, [level.callback for level in self._lightning_compress.levels])

    def deploy(
        self, *, example_inputs: ExampleInputs | None = None, min_gain: float | None = 0.0
    ) -> ChannelGatedNetwork:
        """Return the network as a plain module that computes only chosen channels where that pays.

        It is a copy in evaluation mode.

        Args:
            example_inputs: Samples in a batch as it will come, with which the ways to run it are timed; None: those
                with which the layers were found.
            min_gain: As for `ChannelGatedNetwork`.

        Raises:
            ValueError: There are no gates yet, or no example inputs.
        """
        objective = self._objective()
        network = backbone(resolve_network(self, objective.network))
        given = example_inputs if example_inputs is not None else objective.example_inputs
        given = self.example_input_array if given is None else given
        if objective.gates(self) is None or given is None:
            raise ValueError(
                "deploy() needs gates and example inputs: fit or load the module first, and pass example_inputs=."
            )
        like = next(network.parameters())
        inputs = to_device(given, like.device)
        with without_trainer(self):
            return ChannelGatedNetwork(
                network, inputs if example_inputs is not None else to_type(inputs, like.dtype), min_gain=min_gain
            )

    def operating_points(self) -> list[OperatingPoint]:
        """Return the deployed network, and its controls: as many random channels, and the same channels for all."""
        objective = self._objective()
        gates = objective.gates(self)
        if gates is None or objective.example_inputs is None:
            return []
        ways: dict[Way, str] = {
            "gates": "chosen channels",
            "random": "random channels",
            "static": "the same channels for all",
        }
        deployed, points = self.deploy(), []
        for way, name in ways.items():
            network = copy.deepcopy(deployed)
            network.gates.way = way
            points.append(OperatingPoint(name, network, partial(gates.running, way)))
        return points

    def outline(self, inputs: ExampleInputs) -> Outline | None:
        objective = self._objective()
        network = backbone(resolve_network(self, objective.network))
        if objective.gates(self) is None:
            objective.build(network, inputs)
        gates = objective.gates(self)
        if gates is None:
            return None
        rows = [
            [
                layer.name,
                layer.end,
                str(layer.channels),
                str(count_at(gates.share, layer.channels)),
                f"{sum(p.numel() for p in gate.parameters()):,}",
            ]
            for layer, gate in zip(gates.layers, gates.by_layer().values(), strict=True)
        ]
        with torch.no_grad():
            macs, _ = count_macs(network, inputs)
        refused = {} if objective.found is None else objective.found.refused
        note = f"The network has {macs:,} MACs. " + "; ".join(f"{name}: {why}" for name, why in refused.items())
        return Outline(["layer", "gated after", "channels", "kept by a sample", "parameters of its gate"], rows, note)

    def _objective(self) -> GatedChannels:
        return objective_of(self, GatedChannels)
