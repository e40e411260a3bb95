"""Criteria that use the weights, or the gradient of the batch's loss. Each has one formula:

    magnitude   |w|
    l2          w^2
    random      uniform
    taylor      mean over steps of |g w|
    obd         |h| w^2 / 2, with h the diagonal of the Hessian
    si          (sum over steps of -g dw) / ((w - w_start)^2 + xi)

with w a weight and g its gradient. A channel's score is the sum over its weights; for magnitude and l2 it is their
norm, and for random it is one uniform number. If the loss is scaled (by gradient accumulation), all scores are scaled
by the same factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.pruning.channels import Channels, channel_sums
from lightning_compress.pruning.criteria.statistic import WeightStatistic


def magnitude(weight: Tensor) -> Tensor:
    """Score weights by |w| (Han et al. 2015, section 3).

    Example:
        >>> magnitude(torch.tensor([-2.0, 1.0]))
        tensor([2., 1.])
    """
    return weight.detach().abs()


def l2(weight: Tensor) -> Tensor:
    """Score weights by w^2.

    Example:
        >>> l2(torch.tensor([-2.0, 1.0]))
        tensor([4., 1.])
    """
    return weight.detach().square()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Score weights uniformly in [0, 1), with a CPU generator, so that every device draws the same numbers."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def channel_norm(weights: Mapping[str, Tensor], channels: Channels, order: int) -> Tensor:
    """Score channels by the l1 or l2 norm (`order` 1 or 2) of all weights that make them: shape (size,).

    Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1, for the l1 norm.

    Args:
        weights: The layers' weights, by name.
        channels: The channels.
        order: 1 or 2.

    Example:
        >>> from lightning_compress.channels.groups import Member
        >>> layer = Channels("fc", 2, (Member("fc.weight", 0, torch.tensor([[0], [1]])),))
        >>> channel_norm({"fc.weight": torch.tensor([[3.0, -4.0], [1.0, 0.0]])}, layer, 2)
        tensor([5., 1.])
    """
    sums = [
        channel_sums(_norms(weights[one.tensor].detach(), one.dim, order).pow(order), one) for one in channels.weights
    ]
    return torch.stack(sums).sum(0).pow(1 / order)


def _norms(weight: Tensor, dim: int, order: int) -> Tensor:
    """Return the norm at every position along a dimension, in float32 or wider, without a copy of the weight."""
    others = [other for other in range(weight.dim()) if other != dim % weight.dim()]
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight, order, others, dtype=wide) if others else weight.to(wide).abs()
    return norms


class Taylor(WeightStatistic):
    """First-order change of the loss when a weight is removed: the mean over optimizer steps of |g w|.

    The absolute value is taken in every step, so that gradients of alternating sign do not cancel. g is the gradient
    at the optimizer step, before clipping. (`TaylorChannel` scores channels, by their activations.)

    Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", section 2.2.
    """

    criterion = "taylor"
    rank_local = False

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        groups = [] if optimizer is None else optimizer.param_groups
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        gradients = {
            name: parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            for name, parameter in self.parameters.items()
            if parameter.grad is not None and (optimizer is None or id(parameter) in stepped)
        }
        for name, gradient in gradients.items() if self.finite(gradients.values()) else ():
            self.add(name, (gradient * self.parameters[name]).abs_(), 1)

    def scores(self) -> dict[str, Tensor]:
        return self.collect(self.means())


class Obd(WeightStatistic):
    """Second-order change of the loss when a weight is removed: |h| w^2 / 2, with h the diagonal of the Hessian.

    Hutchinson's estimate: the mean over batches of v * (H v), with v drawn anew from {-1, +1} for each batch, has the
    expectation diag(H). Near a minimum h is small, and the sign of its estimate is mostly chance: with the sign, large
    weights would be removed first. Every batch costs a second backward pass, and memory for its graph.

    LeCun et al. 1990, "Optimal Brain Damage", section 2.2; Hutchinson 1990 for the estimate.

    Args:
        model: The network, in training.
        targets: Qualified parameter names, or `Channels`.
        generator: The CPU generator that draws the probes v.
    """

    criterion = "obd"

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str] | Sequence[Channels],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, targets)
        self.generator = torch.Generator() if generator is None else generator

    def before_backward(self, loss: Tensor) -> None:
        parameters = list(self.parameters.values())
        probes = [random_signs(parameter, self.generator) for parameter in parameters]
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        products = self._hessian_times(probes, gradients, parameters)
        if not self.finite([loss, *(one for one in (*gradients, *products) if one is not None)]):
            return
        for name, gradient, probe, product in zip(self.parameters, gradients, probes, products, strict=True):
            if gradient is not None:
                self.add(name, torch.zeros_like(probe) if product is None else probe * product, 1)

    def _hessian_times(
        self, probes: Sequence[Tensor], gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        # A gradient without a graph does not depend on the weights, so that its second derivatives are zero.
        curved = [(g, v) for g, v in zip(gradients, probes, strict=True) if g is not None and g.requires_grad]
        if not curved:
            return [None for _ in parameters]
        outputs, vectors = zip(*curved, strict=True)
        refusal = "a function marked once_differentiable" if _is_cut(outputs) else ""
        if not refusal:
            try:
                return torch.autograd.grad(outputs, parameters, vectors, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                refusal = str(error)
                if "not implemented" not in refusal and "double backward" not in refusal:
                    raise
        raise ValueError(
            f"criterion='obd' needs second derivatives, which an operator of the network does not have ({refusal}): "
            "replace the operator (attention has them with torch.nn.attention.SDPBackend.MATH), or choose fisher."
        )

    def scores(self) -> dict[str, Tensor]:
        changes = self.times_square({name: h.abs_() for name, h in self.means().items()})
        return self.collect({name: change.div_(2) for name, change in changes.items()})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())


def _is_cut(gradients: Sequence[Tensor]) -> bool:
    """Whether a node in the gradients' graph refuses a second derivative: autograd would silently take it for zero."""
    todo = [gradient.grad_fn for gradient in gradients]
    seen = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            if node.name() == "torch::autograd::Error":
                return True
            seen.add(node)
            todo += [source for source, _ in node.next_functions]
    return False


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from {-1, +1} with equal probability, with a CPU generator, so that every device draws the same numbers."""
    return (torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(like)


class Si(WeightStatistic):
    """Synaptic intelligence: the fall of the loss due to the changes of a weight, over how far the weight has moved.

        omega / ((w - w_start)^2 + xi)        omega = sum over steps of -g dw

    with g the gradient before clipping, dw the change of w in the optimizer step, and w_start the weight before the
    first step. The sum runs over the whole training: `reset` forgets nothing.

    Zenke et al. 2017, "Continual Learning Through Synaptic Intelligence", equations 3 to 5.

    Args:
        model: The network, in training.
        targets: Qualified parameter names, or `Channels`.
        xi: Keeps the score of a weight that has hardly moved finite; it is compared with w^2.

    Example:
        >>> net = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> si = Si(net, ["weight"])
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     net(torch.ones(4, 3)).square().mean().backward()
        ...     si.before_step()
        ...     optimizer.step()
        ...     si.after_step()
        >>> si.scores()["weight"].shape
        torch.Size([1, 3])
    """

    criterion = "si"
    needs = "optimizer steps"
    rank_local = False
    needs_training = True

    def __init__(self, model: nn.Module, targets: Sequence[str] | Sequence[Channels], *, xi: float = 1e-3) -> None:
        super().__init__(model, targets)
        if not xi > 0:
            raise ValueError(f"xi must be > 0; got {xi!r}.")
        self.xi = xi
        self.start: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def before_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        if not self.start:
            self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._before = {
            # These are copies, because clipping and the step work in place.
            name: (parameter.grad.clone(), parameter.detach().clone())
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }

    def after_step(self) -> None:
        gradients = [gradient for gradient, _ in self._before.values()]
        steps = [self.parameters[name].detach() for name in self._before]
        for name, (gradient, before) in self._before.items() if self.finite([*gradients, *steps]) else ():
            self.add(name, before.sub_(self.parameters[name].detach()).mul_(gradient), 1)
        self._before.clear()

    def scores(self) -> dict[str, Tensor]:
        self.check_seen()
        return self.collect({name: self._score(name, omega) for name, omega in self.sums.items()})

    def _score(self, name: str, omega: Tensor) -> Tensor:
        now = self.parameters[name].detach()
        moved = (now - self.start[name].to(now.device)).to(omega.dtype)
        return torch.div(omega.to(now.device), moved.square_().add_(self.xi), out=moved)

    def reset(self) -> None:
        """Forget nothing: the sum runs over the whole training."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": dict(self.start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.start = {name: value.clone() for name, value in state["start"].items()}
