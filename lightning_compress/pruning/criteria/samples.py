"""Criteria that use the gradient of every single sample. Each has one formula:

    fisher      F w^2 / 2, with F the mean over samples of g_n^2
    ewc         F w^2, with F the same for labels that the model draws itself
    mas         mean over samples of |d ||f(x_n)||^2 / dw|

with w a weight and g_n the gradient of sample n's loss. A channel's score is the sum over its weights, except for
fisher: the mean over samples of (sum over these weights of g_n w)^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.channels.groups import Member
from lightning_compress.core.precision import widened
from lightning_compress.pruning.channels import Channels
from lightning_compress.pruning.criteria.predictions import OutputCapture
from lightning_compress.pruning.criteria.sample_gradients import Call, SampleGradients
from lightning_compress.pruning.criteria.statistic import WeightStatistic


class SampleStatistic(WeightStatistic):
    """A mean over samples of a function of each sample's own gradient.

    Each batch costs one more backward pass, which leaves out the parameters, and then the gradients of its samples.

    Raises:
        ValueError: A target belongs to a module that is no linear layer or (transposed) convolution.
    """

    needs = "calls of a layer with gradients at its output"
    power: ClassVar[Callable[[Tensor], Tensor]]

    def __init__(
        self, model: nn.Module, targets: Sequence[str] | Sequence[Channels], *, keep_products: bool = False
    ) -> None:
        super().__init__(model, targets)
        self.layers = SampleGradients(model, self.parameters, criterion=self.criterion, keep_products=keep_products)

    def begin(self) -> None:
        self.end()
        self.handles += self.layers.watch()

    def end(self) -> None:
        super().end()
        self.layers.clear()

    def differentiate(self, objective: Tensor, *, loss: Tensor, rows: int | None = None) -> None:
        """Add the gradients of `objective`, a sum over the `rows` samples of a batch with that loss, to the sums."""
        calls = self.layers.backward(objective, rows=rows)
        if calls:
            # A hand-written loop may call this inside autocast.
            with torch.no_grad(), torch.autocast(objective.device.type, enabled=False):
                totals = self.see(calls, n_samples=len(calls[0].x))
                for name, total in totals.items() if self.finite([loss, *totals.values()]) else ():
                    self.add(name, total, len(calls[0].x))

    def see(self, calls: Sequence[Call], *, n_samples: int) -> dict[str, Tensor]:
        """Return the sums over the samples, given the layers' calls with the gradients at their outputs."""
        return self.layers.sums(calls, type(self).power)


class Fisher(SampleStatistic):
    """Expected second-order change of the loss when a weight is removed: F w^2 / 2, F the mean over samples of g_n^2.

    g_n is the gradient of sample n's own loss: the training loss must be the mean over the samples of the batch. The
    weights of a channel are removed together: its score is the mean over samples of (sum over its weights of g_n w)^2.

    Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning".

    Args:
        model: The network, in training.
        targets: Qualified parameter names, or `Channels`.
    """

    criterion = "fisher"
    power = torch.square

    def __init__(self, model: nn.Module, targets: Sequence[str] | Sequence[Channels]) -> None:
        super().__init__(model, targets, keep_products=any(isinstance(target, Channels) for target in targets))

    def summed(self) -> Mapping[str, Tensor]:
        if not self.channels:
            return self.parameters
        return {layer.name: self.parameters[layer.weights[0].tensor].new_zeros(layer.size) for layer in self.channels}

    def before_backward(self, loss: Tensor) -> None:
        self.differentiate(loss, loss=loss)

    def see(self, calls: Sequence[Call], *, n_samples: int) -> dict[str, Tensor]:
        # A mean over the batch divides every sample's own gradient by n_samples.
        if not self.channels:
            return {name: total.mul_(n_samples**2) for name, total in self.layers.sums(calls, torch.square).items()}
        products = self.layers.channel_products(calls)
        totals = {}
        for layer in self.channels:
            changes = [
                n_samples * self._by_row(products[one.tensor], one)[:, one.index.to(calls[0].x.device)].sum(2)
                for one in layer.weights
                if one.tensor in products
            ]
            if changes:
                totals[layer.name] = torch.stack(changes).sum(0).square().sum(0)
        return totals

    def _by_row(self, product_BO: Tensor, member: Member) -> Tensor:
        """Turn sums over the weights of output channels into sums over the rows that the member counts."""
        rows = self.parameters[member.tensor].shape[member.dim]
        if product_BO.shape[1] == rows:
            return product_BO
        if member.dim == 1:  # in a grouped transposed convolution every block has a channel per row
            return product_BO.reshape(len(product_BO), -1, rows).sum(1)
        ((layer, _), *_) = self.layers.owners[member.tensor]
        blocks = int(getattr(layer, "groups", 1))  # here the rows are those of the input
        return (
            product_BO.reshape(len(product_BO), blocks, -1).sum(2).repeat_interleave(rows // blocks, 1) * blocks / rows
        )

    def scores(self) -> dict[str, Tensor]:
        if self.channels:
            return self.means()
        return {name: score.div_(2) for name, score in self.times_square(self.means()).items()}


class OutputStatistic(SampleStatistic):
    """A mean over samples that is computed from the network's output and not from the loss.

    Args:
        model: The network, in training.
        targets: Qualified parameter names, or `Channels`.
        network: The submodule whose output is the prediction; it may be `model` itself.
        output: Key, attribute or index of the prediction in that output, if it is not a tensor and has no `.logits`.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str] | Sequence[Channels],
        *,
        network: nn.Module,
        output: str | int | None = None,
    ) -> None:
        super().__init__(model, targets)
        self.outputs = OutputCapture(network, output, criterion=self.criterion)

    def begin(self) -> None:
        super().begin()
        self.handles += self.outputs.watch()

    def end(self) -> None:
        super().end()
        self.outputs.clear()

    def before_backward(self, loss: Tensor) -> None:
        # A second loss of the same forward pass finds no predictions: they have been taken.
        if predictions := self.outputs.take():
            objectives = [self.objective(widened(prediction)) for prediction in predictions]
            self.differentiate(torch.stack(objectives).sum(), loss=loss, rows=len(predictions[0]))

    def objective(self, prediction: Tensor) -> Tensor:
        """Return the function of the prediction that is differentiated, summed over samples."""
        raise NotImplementedError


class Ewc(OutputStatistic):
    """Fisher information of the model's own predictions, about w = 0: F w^2.

    F is the mean over samples of g_n^2, with g_n the gradient of -log p(y_n | x_n), where y_n is drawn from the model's
    softmax and not taken from the data. (Elastic weight consolidation multiplies by (w - w*)^2, where w* is the weight
    of the new task; here it is 0.)

    Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", equation 3.

    Args:
        model: The network, in training.
        targets: Qualified parameter names, or `Channels`.
        network: The submodule whose output is the logits, (B, C) or (B, C, positions...).
        output: Key, attribute or index of the logits in that output, if it is not a tensor and has no `.logits`.
        generator: Draws the labels, on the CPU.
    """

    criterion = "ewc"
    power = torch.square

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str] | Sequence[Channels],
        *,
        network: nn.Module,
        output: str | int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, targets, network=network, output=output)
        self.generator = torch.Generator() if generator is None else generator

    def objective(self, prediction: Tensor) -> Tensor:
        if prediction.dim() < 2 or prediction.shape[1] < 2:
            raise ValueError(
                "criterion='ewc' draws labels from a softmax over at least 2 classes, so it needs logits of shape "
                f"(samples, classes, ...); the network's output has shape {tuple(prediction.shape)}: pass network= "
                "with the submodule that returns them, or choose fisher."
            )
        labels = draw_labels(prediction.detach(), self.generator)
        return F.cross_entropy(prediction, labels, reduction="sum")

    def scores(self) -> dict[str, Tensor]:
        return self.collect(self.times_square(self.means()))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw labels from softmax(logits): (B, C, ...) -> (B, ...), the same on every device.

    Example:
        >>> draw_labels(torch.tensor([[0.0, 50.0], [50.0, 0.0]]), torch.Generator())
        tensor([1, 0])
    """
    cumulative = logits.softmax(1).cumsum(1)
    uniform = torch.rand(cumulative[:, :1].shape, generator=generator).to(cumulative)
    # By rounding the last entry may differ from 1, and the product may reach it.
    return (cumulative <= uniform * cumulative[:, -1:]).sum(1).clamp_(max=logits.shape[1] - 1)


class Mas(OutputStatistic):
    """Sensitivity of the output to a weight, without labels: the mean over samples of |d ||f(x_n)||^2 / dw|.

    Aljundi et al. 2018, "Memory Aware Synapses", section 4.1.
    """

    criterion = "mas"
    power = torch.abs

    def objective(self, prediction: Tensor) -> Tensor:
        if prediction.dim() == 0:
            raise ValueError(
                "criterion='mas' needs the network's output, samples in dimension 0, but was given a single number: "
                "pass network= with the submodule that returns the prediction."
            )
        return prediction.square().sum()

    def scores(self) -> dict[str, Tensor]:
        return self.collect(self.means())
