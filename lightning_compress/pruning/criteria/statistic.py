"""The statistics of data-driven criteria, and the interface between a criterion and a training loop.

A training step with two accumulated micro-batches calls these methods, in this order:

    begin  forward  before_backward(loss)  backward  end        micro-batch 1
    begin  forward  before_backward(loss)  backward  end        micro-batch 2
    before_step  [clip]  optimizer.step  after_step

and an event, at which entries are pruned, calls

    reduce (several ranks)  scores  reset
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.pruning.channels import Channels, channel_sums

ModelT = TypeVar("ModelT", bound=nn.Module)
BatchT = TypeVar("BatchT")


class Statistic:
    """Sums over samples or steps since the last reset, with the number of terms of each sum.

    A subclass calls `track` for every target in its constructor, so that all ranks hold the same tensors in the same
    order, and `add` for the values of a batch or step. It overrides `scores` and those of the moments below at which it
    collects values. It puts its hooks into `handles`, from which `end` removes them.

    Attributes:
        criterion: The criterion's name, for error messages.
        needs: The kind of values that the criterion collects, for the error message when it has none.
        rank_local: Whether every rank sees its own data, so that sums are added over ranks; False if all ranks see the
            same values (`p.grad` after DistributedDataParallel).
        needs_training: Whether the criterion must see the weights change, so that `estimate` cannot compute it.
        sums: One tensor per target.
        counts: The number of samples, positions or steps that are the terms of each sum.
    """

    criterion: ClassVar[str]
    needs: ClassVar[str] = "gradients"
    rank_local: ClassVar[bool] = True
    needs_training: ClassVar[bool] = False

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles: list[RemovableHandle] = []
        self.n_left_out = 0  # batches or steps that were not finite

    def track(self, name: str, like: Tensor) -> None:
        """Start a sum of zeros with the shape and device of `like`, in float32 or wider."""
        self.sums[name] = torch.zeros_like(
            like, dtype=torch.promote_types(like.dtype, torch.float32), memory_format=torch.contiguous_format
        )
        self.counts[name] = 0

    def add(self, name: str, total: Tensor, count: int) -> None:
        """Add `total`, itself a sum of `count` terms, to the sum of `name`."""
        # The model may have moved to its device after the constructor, and checkpoints are loaded on the CPU.
        self.sums[name] = self.sums[name].to(total.device).add_(total.detach())
        self.counts[name] += count

    def finite(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all entries are finite; else the caller leaves the batch or step out, and a warning says so once.

        A single one that is not finite would make every later score NaN, while the training may just skip its step.
        """
        if all_finite(tensors):
            return True
        if self.n_left_out == 0:
            warnings.warn(
                f"criterion={self.criterion!r} leaves out what it sees of a batch or step with a loss, gradient or "
                f"activation that is not finite, and of all others of that kind.",
                stacklevel=2,
            )
        self.n_left_out += 1
        return False

    def means(self) -> dict[str, Tensor]:
        """Return the sums divided by their counts.

        Raises:
            ValueError: The sum of a target has no terms.
        """
        self.check_seen()
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def check_seen(self) -> None:
        """Raise a ValueError if the sum of a target has no terms."""
        unseen = [name for name, count in self.counts.items() if count == 0]
        if unseen:
            others = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
            raise ValueError(
                f"criterion={self.criterion!r} needs {self.needs}, and has seen none of {unseen[0]!r}{others} since "
                "the last pruning: start_epoch must be > 0, so that training steps come first, and the target must "
                "take part in them. magnitude, l2 and random need no data."
                + (f" {self.n_left_out} batches were left out, which were not finite." if self.n_left_out else "")
            )

    def begin(self) -> None:
        """Put hooks in place, before the forward pass of a micro-batch."""

    def before_backward(self, loss: Tensor) -> None:
        """Collect values between forward and backward; `loss` has its graph, and the ordinary backward pass follows."""

    def before_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Collect gradients before an optimizer steps; `p.grad` is averaged over accumulation and ranks, not clipped.

        `optimizer` is given if there are several; the gradients of the other ones' parameters are those of earlier
        steps.
        """

    def after_step(self) -> None:
        """Collect values after the optimizer has stepped, before entries are masked."""

    def end(self) -> None:
        """Remove the hooks and free the graph, after the backward pass or an exception; idempotent."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def scores(self) -> dict[str, Tensor]:
        """Return the scores of every target, the lowest for the least important entry.

        Raises:
            ValueError: The sum of a target has no terms.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Set the sums to zero, at the start of a new interval."""
        for name, total in self.sums.items():
            self.sums[name] = torch.zeros_like(total)
            self.counts[name] = 0

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of all ranks, before `scores`, if they are local to a rank.

        Every rank then holds the total, so that all of them, or all but one, must be `reset` before they go on.
        """
        if not self.rank_local or not self.sums:
            return
        for name, total in self.sums.items():
            self.sums[name] = all_reduce_sum(total)
        device = next(iter(self.sums.values())).device
        counts = all_reduce_sum(torch.tensor(list(self.counts.values()), device=device))
        self.counts = dict(zip(self.counts, counts.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts since the last reset, as tensors, numbers, strings, lists and dicts."""
        return {"criterion": self.criterion, "sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: The state is that of another criterion, or of other targets.
        """
        if state["criterion"] != self.criterion:
            raise ValueError(f"the state is of criterion {state['criterion']!r}, but this is {self.criterion!r}.")
        for name, total in self.sums.items():
            saved = state["sums"].get(name)
            if saved is None or saved.shape != total.shape:
                found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                raise ValueError(
                    f"criterion={self.criterion!r}: for {name!r} of shape {tuple(total.shape)} the checkpoint holds "
                    f"{found}; resume with the same model, target and granularity."
                )
            self.sums[name] = saved.to(total, copy=True)
        self.counts = {name: int(state["counts"][name]) for name in self.counts}


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries of all tensors are finite; no tensor is copied.

    Example:
        >>> all_finite([torch.ones(3), torch.zeros(0)]), all_finite([torch.ones(3), torch.tensor([1.0, -torch.inf])])
        (True, False)
    """
    verdicts = []
    for tensor in tensors:
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        values = torch.view_as_real(values) if values.is_complex() else values
        if values.numel() > 0:
            verdicts.append(torch.stack(torch.aminmax(values)).isfinite().all())  # a NaN is minimum and maximum
    return bool(torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).all()) if verdicts else True


class WeightStatistic(Statistic):
    """Base class of statistics with one entry per weight.

    Args:
        model: The network, in training.
        targets: Qualified parameter names, to score weights, or `Channels`, to score channels.

    Raises:
        ValueError: A targeted parameter does not exist or is frozen.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str] | Sequence[Channels]) -> None:
        super().__init__()
        self.channels = [target for target in targets if isinstance(target, Channels)]
        names = [target for target in targets if not isinstance(target, Channels)]
        names += [member.tensor for layer in self.channels for member in layer.weights]
        self.parameters = {name: self._parameter(model, name) for name in names}
        for name, like in self.summed().items():
            self.track(name, like)

    def _parameter(self, model: nn.Module, name: str) -> nn.Parameter:
        try:
            parameter = model.get_parameter(name)
        except AttributeError as error:
            raise ValueError(f"criterion={self.criterion!r}: {name!r} is no parameter of the model.") from error
        if not parameter.requires_grad:
            raise ValueError(
                f"criterion={self.criterion!r} needs the gradient of {name!r}, which is frozen (requires_grad=False): "
                "exclude it, unfreeze it, or choose magnitude, l2 or random."
            )
        return parameter

    def summed(self) -> Mapping[str, Tensor]:
        """Return the names of the sums, each with a tensor of the sum's shape."""
        return self.parameters

    def collect(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scores of the targets from those of the weights: for channels the sums over their weights."""
        if not self.channels:
            return dict(scores)
        return {
            layer.name: torch.stack([channel_sums(scores[one.tensor], one) for one in layer.weights]).sum(0)
            for layer in self.channels
        }

    def times_square(self, curvature: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by w^2, with w the present weights; in place if the values are on the weights' device."""
        weights = {name: self.parameters[name].detach() for name in curvature}
        return {
            name: value.to(weights[name].device).mul_(weights[name]).mul_(weights[name])
            for name, value in curvature.items()
        }


def estimate(
    statistic: Statistic,
    model: ModelT,
    loss_fn: Callable[[ModelT, BatchT], Tensor],
    batches: Iterable[BatchT],
) -> dict[str, Tensor]:
    """Score `model` on `batches` by a data-driven criterion, without training.

    Every batch counts as one step. Weights and `.grad` stay as they are. The caller sets the mode: call `model.eval()`
    first if batch-norm buffers must not change. Sums that the statistic holds already still count.

    Args:
        statistic: Any data-driven criterion, made for `model`.
        model: A plain network.
        loss_fn: The mean loss of a batch, `loss_fn(model, batch)`.
        batches: The batches that `loss_fn` takes.

    Raises:
        ValueError: The criterion must see the weights change (si), or there is no batch.

    Example:
        >>> from lightning_compress.pruning.criteria.weights import Taylor
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight.data = torch.tensor([[2.0, 3.0]])
        >>> estimate(Taylor(net, ["weight"]), net, lambda net, x: net(x).mean(), [torch.ones(4, 2)])
        {'weight': tensor([[2., 3.]])}
    """
    if statistic.needs_training:
        raise ValueError(
            f"criterion={statistic.criterion!r} must see the weights move, so it cannot be estimated on batches: call "
            "before_step() and after_step() around the steps of a training loop, then scores()."
        )
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            statistic.begin()
            loss = loss_fn(model, batch)
            statistic.before_backward(loss)
            loss.backward()  # type: ignore[no-untyped-call]
            statistic.end()
            statistic.before_step()
            statistic.after_step()
    finally:
        statistic.end()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    return statistic.scores()
