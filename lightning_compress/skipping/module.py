"""Skipped blocks as a wrapper: any LightningModule whose network has residual blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_compress.core.answering import copied_alone
from lightning_compress.core.example_inputs import ExampleInputs, batch_size, to_device
from lightning_compress.skipping.budget import Budget, Measured, most_used
from lightning_compress.skipping.controls import Drawn, DrawnGates
from lightning_compress.skipping.gates import GateKind, Instead, SkipGates, gates_of
from lightning_compress.skipping.network import SkippingNetwork
from lightning_compress.skipping.objective import Skipping, Training
from lightning_compress.skipping.record import note_gates, take_gates
from lightning_compress.stages.block_times import time_blocks
from lightning_compress.trainer.compatibility import check_together
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.one_step import backbone
from lightning_compress.trainer.operating_points import OperatingPoint
from lightning_compress.trainer.outline import Outline
from lightning_compress.trainer.quiet import validate_quietly
from lightning_compress.trainer.unwrap import objective_of, without_trainer
from lightning_compress.trainer.wrapper import CompressionModule, check_wrappable


class SkippableBlocks(CompressionModule):
    """Give a trained network gates: for each sample they decide which of its residual blocks run.

    A block x + F(x) becomes x + g F(x), g = 0 or 1 for each sample, from a small module that reads x. With e the
    module's own loss:

        loss = e + w (u / t - 1)^2                    u the mean share of the network's MACs that samples use

    t falls from 1 to the target in the first third of the fit. Gates begin open, and a gate opens where its logit is
    above 0; in training it gets the gradient of its probability. The gates act whenever the network runs, by
    multiplication; `deploy` skips what they close.

    The gates become a part of the network, as its child `skip_gates`: they are saved with it in checkpoints and
    compressed files. The keys and shapes of the module's own tensors stay.

    Args:
        module: The LightningModule; its network should be trained already.
        blocks: Names of residual blocks, as `task=inspect` lists them; None: all whose shortcut is the identity, or
            those of the gates that the network has already, as from a compressed file.
        gate: "per_block", a gate of its own before each block (ConvNet-AIG, SkipNet); "recurrent", one with a memory
            for all blocks (SkipNet); "policy", a small network that looks once and decides for all blocks (BlockDrop).
            None: that of the gates that the network has already, else "per_block".
        target: t, the mean share of the network's MACs that samples may use, without those of the gates.
        budget: "total", as above, which leaves it to training which blocks are run; "per_gate": w sum over k of
            (m_k - r)^2, where m_k is the share of a batch that runs block k and r the rate at which t is met, under
            which all gates go on to differ between samples.
        weight: w; rewards have none.
        train: "straight_through": decisions get the gradient of their probabilities. "reinforce": they get rewards, of
            SkipNet, or of BlockDrop for a policy, which begins with the last block. The price of cost rises while
            samples use more than t, which is a bound then: blocks without which answers stay right are closed.
            "hybrid": rewards follow in the last third of the fit. Rewards need the classes in the batch; else gates are
            paid for answers as those of the network with all blocks.
        noise: Whether decisions are drawn at random until `end_epoch`, as in the papers.
        temperature: Of the probabilities whose gradient decisions get.
        end_epoch: When the last third of the fit begins; t has fallen at half of that time. None: at two thirds of the
            planned steps.
        network: Dotted path of the submodule whose output is the prediction; empty: the module's own forward.
        output: Key, position or attribute of the logits, where the network returns more than a tensor.
        example_inputs: What the network is called with, to find its blocks; None: the module's
            `example_input_array`, or else one peeked batch when the fit begins, until which there are no gates, unless
            a checkpoint brings them.

    Raises:
        TypeError: `module` is no LightningModule.
        ValueError: A number out of range; a target below what the network costs without its blocks; no block to skip,
            or none of a name; other gates than the network has.

    Paper:
        Veit and Belongie, ConvNet-AIG (1711.11503); Wang et al., SkipNet (1711.09485); Wu et al., BlockDrop
        (1711.08393).
    """

    __slots__ = ()

    def __init__(
        self,
        module: LightningModule,
        blocks: str | Sequence[str] | None = None,
        *,
        gate: GateKind | None = None,
        target: float = 0.6,
        budget: Budget = "total",
        weight: float = 2.0,
        train: Training = "straight_through",
        noise: bool = False,
        temperature: float = 1.0,
        end_epoch: float | None = None,
        network: str = "",
        output: str | int | None = None,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        check_wrappable(module, type(self))
        objective = Skipping(
            blocks,
            gate=gate,
            target=target,
            budget=budget,
            weight=weight,
            train=train,
            noise=noise,
            temperature=temperature,
            end_epoch=end_epoch,
            network=network,
            output=output,
            example_inputs=example_inputs,
        )
        super().__init__(module, objective)
        check_together(self, [level.callback for level in self._lightning_compress.levels])
        found = resolve_network(module, network)
        given = example_inputs if example_inputs is not None else getattr(module, "example_input_array", None)
        if not objective.adopt(found):
            if given is not None:
                objective.build(found, given)
            elif objective.blocks != []:
                note_gates(backbone(found))
        elif given is not None:
            objective.recount(found, given)

    def measure(self, loader: Any, *, trainer: Trainer | None = None) -> Measured:
        """Return what the gates do to the samples of a loader, and keep their rates for `deploy`.

        The module's own validation step runs over the loader, as in `trainer.validate`.

        Args:
            loader: Of samples that the network was not trained on; or a LightningDataModule.
            trainer: Runs the validation; None: one on the module's device that reports nothing.

        Raises:
            ValueError: There are no gates yet; the validation step did not run the network.
        """
        self._recount()
        objective = self._objective()
        found: list[Measured] = []
        objective.measuring = found
        try:
            validate_quietly(self, loader, trainer)
        finally:
            objective.measuring = None
        if not found:
            raise ValueError(
                f"The validation step has not called the network {objective.network!r}, whose gates are measured: it "
                f"must call it, and the loader have a batch."
            )
        return found[-1]

    def deploy(self, *, example_inputs: ExampleInputs | None = None, **options: Any) -> SkippingNetwork:
        """Return the network as a plain module that skips blocks: `forward(x) -> output`.

        It is a copy in evaluation mode. A gate whose rate is below 5 or above 95 %, in the last validation of a fit or
        in `measure`, is not computed: its block runs for nobody, or for all.

        Args:
            example_inputs: Some samples; None: those with which the blocks were found.
            options: Of `SkippingNetwork`, such as `min_gain`.

        Raises:
            ValueError: There are no gates yet, or no example inputs; a gate is no longer finite.
        """
        return self._deployed(example_inputs, **options)

    def operating_points(self) -> list[OperatingPoint]:
        """Return the controls: gates at random at the same rates, and the most used blocks for all samples."""
        gates = gates_of(backbone(resolve_network(self, self._objective().network)))
        if gates is None or self._example_inputs() is None or bool(gates.rates.isnan().any()):
            return []
        self._recount()
        chosen = most_used(gates)
        always = [block.name for block, runs in zip(gates.blocks, chosen, strict=True) if runs]
        never = [block.name for block, runs in zip(gates.blocks, chosen, strict=True) if not runs]
        static = self._deployed(None, always=always, never=never)
        drawn = self._deployed(None, DrawnGates.like)
        return [
            self._point("gates", self.deploy(), None),
            self._point("random gates", drawn, Drawn(gates)),
            self._point("static", static, None),
        ]

    def _point(self, name: str, network: SkippingNetwork, instead: Instead | None) -> OperatingPoint:
        """Return a point that answers as its network does, which runs some blocks for all samples, or for nobody."""
        fixed = dict.fromkeys(network.always, True) | dict.fromkeys(network.never, False)
        return OperatingPoint(name, network, partial(self._deciding, instead, fixed))

    def outline(self, inputs: ExampleInputs) -> Outline | None:
        objective = self._objective()
        network = backbone(resolve_network(self, objective.network))
        if gates_of(network) is None:
            objective.build(network, inputs)
        with without_trainer(self):
            objective.recount(network, inputs)
        gates = gates_of(network)
        if gates is None:
            return None
        with without_trainer(self):
            bare = copied_alone(network)
        take_gates(bare)
        times = time_blocks(bare, inputs, output=objective.output)
        rows = []
        for number, block in enumerate(gates.blocks, start=1):
            seconds = times.seconds[block.name]
            share, of_time = block.macs / gates.macs, seconds / times.network
            rows.append(
                [str(number), block.name, f"{block.macs:,}", f"{share:.1%}", f"{1000 * seconds:.2f}", f"{of_time:.1%}"]
            )
        note = (
            f"Shares are of the network's {gates.macs:,} MACs per sample, of which {gates.least:.1%} remain without "
            f"any block, and of its {1000 * times.network:.2f} ms for a batch of {batch_size(inputs)} on this machine."
        )
        return Outline(["block", "name", "MACs", "share", "ms", "of the time"], rows, note)

    @contextmanager
    def _deciding(self, instead: Instead | None, fixed: Mapping[str, bool]) -> Iterator[None]:
        gates = self._gates()
        gates.instead = instead
        gates.fixed = {k: fixed[one.name] for k, one in enumerate(gates.blocks) if one.name in fixed}
        try:
            yield
        finally:
            gates.instead, gates.fixed = None, {}

    def _objective(self) -> Skipping:
        return objective_of(self, Skipping)

    def _gates(self) -> SkipGates:
        gates = self._objective().gates(self)
        if gates is None:
            raise ValueError(
                "The network has no gates yet, as no fit has begun: pass example_inputs=, or fit or load the module."
            )
        return gates

    def _recount(self) -> None:
        """Have the gates know the MACs of the network as it is now, if there is something to call it with."""
        self._gates()
        inputs, objective = self._example_inputs(), self._objective()
        if inputs is not None:
            network = resolve_network(self, objective.network)
            device = next((one.device for one in network.parameters()), torch.device("cpu"))
            with without_trainer(self):
                objective.recount(network, to_device(inputs, device))

    def _example_inputs(self) -> ExampleInputs | None:
        given = self._objective().example_inputs
        return self.example_input_array if given is None else given

    def _deployed(
        self, given: ExampleInputs | None, change: Callable[[SkipGates], SkipGates] | None = None, **options: Any
    ) -> SkippingNetwork:
        objective, gates = self._objective(), self._gates()
        inputs = self._example_inputs() if given is None else given
        if inputs is None:
            raise ValueError("deploy() needs example inputs: fit the module first, or pass example_inputs=.")
        for name, parameter in gates.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"The gates have {name} with values that are no finite numbers: their training diverged. Train "
                    f"with a smaller learning rate."
                )
        with without_trainer(self):
            network = copied_alone(backbone(resolve_network(self, objective.network))).eval()
        own = gates_of(network)
        assert own is not None, "there are some in what was copied"
        take_gates(network)
        device = next((one.device for one in network.parameters()), torch.device("cpu"))
        moved = to_device(inputs, device)
        decide = own if change is None else change(own)
        return SkippingNetwork(network, decide.eval(), moved, output=objective.output, **options).eval()
