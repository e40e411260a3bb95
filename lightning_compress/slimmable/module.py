"""Slimmable networks as a wrapper: any LightningModule whose network also runs with fewer channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_compress.core.example_inputs import ExampleInputs, to_device, to_type
from lightning_compress.core.given import whole_number
from lightning_compress.measure.macs import count_macs
from lightning_compress.slimmable.network import SlimmableNetwork, extract
from lightning_compress.slimmable.norms import Norms
from lightning_compress.slimmable.objective import Widths
from lightning_compress.slimmable.order import Order
from lightning_compress.slimmable.record import note_widths
from lightning_compress.slimmable.switch import set_width, width_of
from lightning_compress.slimmable.widths import Width, shrinkable
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.loss_weights import Weights
from lightning_compress.trainer.one_step import backbone
from lightning_compress.trainer.operating_points import OperatingPoint
from lightning_compress.trainer.outline import Outline
from lightning_compress.trainer.quiet import validate_quietly
from lightning_compress.trainer.unwrap import objective_of, without_trainer
from lightning_compress.trainer.wrapper import CompressionModule, check_wrappable


class SlimmableWidth(CompressionModule):
    """Train one network that runs at several widths: width w keeps the first ceil(w C) of each group's C channels.

    With e_w the module's own loss when its network runs at width w, and z_w the logits:

        loss = v_1 e_1 + sum over w < 1 of v_w [(1 - a) e_w + a T^2 KL(softmax(z_1 / T) || softmax(z_w / T))]

    The module's `training_step` runs as it is; then it is run again for each width, with the thinner network in the
    place of the network, from the same random states, and with metrics of its own. What it logs as "val_acc" is logged
    as "width0.25/val_acc" and so on, for the full network as "val_acc" too. Validation and test report all widths
    likewise. The thinner networks have no weights of their own, but for their norms.

    What norms hold per width becomes a part of the network, as its child `width_norms`: it is saved with it in
    checkpoints and compressed files. The keys and shapes of the module's own tensors stay.

    Args:
        module: The LightningModule; it may be an `EarlyExitHeads`, whose exits are then trained at every width.
        widths: Shares of the channels, above 0 and at most 1; 1.0 is always among them. None: the widths that the
            network has already, as from a compressed file.
        universal: Train for any width: each step runs the widest, the narrowest and two random widths between.
        norms: "private": each width has statistics, scales and shifts of its own in batch norms; "statistics": it has
            statistics of its own; "recalibrate": training tracks none, and before each validation and at the end of
            the fit the statistics of all `widths` are computed anew from samples of the last five batches, which are in
            checkpoints. None: "private", and "recalibrate" with `universal`; or those of the widths that it has.
        weights: v, one for each width, the smallest first, numbers or schedules as in `DistillationModule`; "equal":
            all 1; "rising": that of the k-th of K thinner widths rises to k / (K + 1), from 0.01. None: "rising", and
            "equal" with `universal`.
        distill: The share a of the full network's outputs in the loss of a width. None: 0.5, and 1 with `universal`.
        temperature: T.
        order: By what channels are sorted once, before training, the important ones first, which leaves the network's
            function as it is: "magnitude"; a function as in `slimmable.order`; None: their own order.
        allow_inexact: Whether channels that a layer norm, a group norm or a softmax counts are left out as well.
        network: Dotted path of the submodule whose output is the prediction; empty: the module's own forward.
        output: Key, position or attribute of the logits, where the network returns more than a tensor.
        example_inputs: What the network is called with, to find its channels; None: the module's
            `example_input_array`, or else one peeked batch when the fit begins, until which there are no widths.

    Raises:
        TypeError: `module` is no LightningModule.
        ValueError: A width out of range, doubled, or with the same channels as another; a network none of whose
            channels can leave.

    Paper:
        Yu et al., Slimmable neural networks (1812.08928); Yu and Huang, Universally slimmable networks (1903.05134).

    Example:
        >>> import torch
        >>> from lightning_compress.baselines import Classifier, DigitsConvNet
        >>> module = SlimmableWidth(
        ...     Classifier(DigitsConvNet(width=8)), [0.5], network="network", example_inputs=torch.zeros(2, 1, 8, 8)
        ... )
        >>> module.set_width(0.5)
        >>> module(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 10])
    """

    __slots__ = ()

    def __init__(
        self,
        module: LightningModule,
        widths: Sequence[float] | None = (0.25, 0.5, 0.75, 1.0),
        *,
        universal: bool = False,
        norms: Norms | None = None,
        weights: Weights | None = None,
        distill: float | None = None,
        temperature: float = 1.0,
        order: Order = "magnitude",
        allow_inexact: bool = False,
        network: str = "",
        output: str | int | None = None,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        check_wrappable(module, type(self))
        objective = Widths(
            widths,
            universal=universal,
            norms=norms,
            weights=weights,
            distill=distill,
            temperature=temperature,
            order=order,
            allow_inexact=allow_inexact,
            network=network,
            output=output,
            example_inputs=example_inputs,
        )
        found = resolve_network(module, network)
        given = example_inputs if example_inputs is not None else getattr(module, "example_input_array", None)
        has = objective.adopt(found)
        if not has and widths is None:
            raise ValueError(f"widths=None, and {type(found).__name__} has no widths: pass a list of widths.")
        if given is not None:
            objective.build(found, given)
        elif not has and objective.widths is not None and len(objective.widths) > 1:
            note_widths(backbone(found))
        super().__init__(module, objective)

    def set_width(self, width: Width, *, example_inputs: ExampleInputs | None = None) -> None:
        """Have the network run at a width from now on, in `forward`, validation, test and prediction; 1.0: all of it.

        A fit trains all widths, whichever is set.

        Args:
            width: Of every group of channels, or by group name.
            example_inputs: With which the channels are found, if they are not known yet.

        Raises:
            ValueError: The network has no widths yet, or no statistics for this one.
        """
        objective = self._checked_objective(example_inputs)
        network = backbone(resolve_network(self, objective.network))
        set_width(network, width)

    def extract(self, width: Width, *, example_inputs: ExampleInputs | None = None) -> nn.Module:
        """Return the network of a width alone: a copy with fewer channels, of the network's own class.

        With `example_inputs` its channels are found, if they are not known yet, as after a load.
        """
        objective = self._checked_objective(example_inputs)
        inputs = self._inputs(example_inputs)
        with without_trainer(self):
            return extract(backbone(resolve_network(self, objective.network)), width, inputs)

    def deploy(self, *, example_inputs: ExampleInputs | None = None) -> SlimmableNetwork:
        """Return the network as a plain module that runs at any of its widths: `forward(x, width=...)`.

        It is a copy in evaluation mode. With `example_inputs` its channels are found, if they are not known yet.
        """
        objective = self._checked_objective(example_inputs)
        inputs = self._inputs(example_inputs)
        with without_trainer(self):
            return SlimmableNetwork(backbone(resolve_network(self, objective.network)), inputs)

    def recalibrate(
        self,
        loader: Any,
        *,
        widths: Sequence[Width] | None = None,
        batches: int = 5,
        trainer: Trainer | None = None,
    ) -> None:
        """Compute the statistics of norms anew, for widths that were trained or not, which can be set then.

        The module's own validation step runs over the first batches, for what it calls the network with.

        Args:
            loader: Of samples as in training; or a LightningDataModule.
            widths: Which; None: those that the network has.
            batches: How many batches.
            trainer: Runs the validation; None: one on the module's device that reports nothing.
        """
        whole_number(batches, "batches is a whole number, 1 or more", least=1)
        objective = self._checked_objective()
        found: list[ExampleInputs] = []
        objective.collecting = found.append
        try:
            with self._running_at(1.0):
                validate_quietly(self, loader, trainer, batches=batches)
        finally:
            objective.collecting = None
        if not found:
            raise ValueError(
                f"The validation step has not called the network {objective.network!r}, whose inputs are needed: it "
                f"must call the network itself, and the loader have a batch."
            )
        objective.recalibrate(self, found[:batches], objective.thinner(self) if widths is None else widths)

    def operating_points(self) -> list[OperatingPoint]:
        """Return the point of each width, and at each those of the module inside, such as exits."""
        wrapped, thinner = self._lightning_compress.wrapped, self._objective().thinner(self)
        points = [self._point(width) for width in thinner]
        if isinstance(wrapped, CompressionModule) and thinner:
            for width in (*thinner, 1.0):
                with self._running_at(width):
                    points += [self._point_inside(width, one) for one in wrapped.operating_points()]
        return points

    def outline(self, inputs: ExampleInputs) -> Outline | None:
        objective = self._objective()
        network = backbone(resolve_network(self, objective.network))
        objective.build(network, inputs)
        held = objective.held(self)
        if held is None or held.groups is None:
            return None
        rows = []
        for width in held.widths:
            thin = extract(network, width, inputs)
            macs, _ = count_macs(thin, inputs)
            rows.append([f"{width:g}", f"{macs:,}", f"{sum(one.numel() for one in thin.parameters()):,}"])
        note = shrinkable(network, held.groups, inputs, allow_inexact=objective.allow_inexact)
        return Outline(["width", "MACs", "parameters"], rows, str(note))

    def _point(self, width: float) -> OperatingPoint:
        """Return the network at one width."""
        return OperatingPoint(f"width {width:g}", self.extract(width), partial(self._running_at, width))

    def _point_inside(self, width: float, point: OperatingPoint) -> OperatingPoint:
        """Return a point of the module inside at one width, which answers without being run again at each width."""
        objective = self._objective()

        @contextmanager
        def serving() -> Iterator[None]:
            objective.serving = nullcontext
            try:
                with self._running_at(width), point.answering():
                    yield
            finally:
                objective.serving = None

        return OperatingPoint(f"width {width:g}, {point.name}", point.network, serving)

    @contextmanager
    def _running_at(self, width: float) -> Iterator[None]:
        network = backbone(resolve_network(self, self._objective().network))
        before = width_of(network)
        set_width(network, width)
        try:
            yield
        finally:
            set_width(network, before)

    def _objective(self) -> Widths:
        return objective_of(self, Widths)

    def _checked_objective(self, example_inputs: ExampleInputs | None = None) -> Widths:
        """Return the objective of a network that runs at widths, after its channels are found if they can be."""
        objective = self._objective()
        if example_inputs is not None and not objective.thinner(self):
            with without_trainer(self):
                objective.build(resolve_network(self, objective.network), example_inputs)
        if not objective.thinner(self):
            raise ValueError(
                "The network has no widths yet, or its channels are not known: pass example_inputs=, here or to "
                "SlimmableWidth, or fit the module first."
            )
        return objective

    def _inputs(self, given: ExampleInputs | None) -> ExampleInputs:
        inputs = given if given is not None else self._objective().example_inputs
        assert inputs is not None, "a network whose channels are known was called with some"
        like = next(backbone(resolve_network(self, self._objective().network)).parameters())
        return inputs if given is not None else to_type(to_device(inputs, like.device), like.dtype)
