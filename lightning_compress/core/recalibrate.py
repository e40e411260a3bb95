"""Computes the statistics of a network's norms anew, as a part of a network needs that was not trained by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.core.distributed import all_reduce_sum
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs, call, to_device


def tracks(module: nn.Module) -> bool:
    """Return whether a module is a norm that tracks statistics."""
    return isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None


def recalibrate(
    network: nn.Module, inputs: Iterable[ExampleInputs], *, batches: int = 5, frozen: bool = True
) -> list[str]:
    """Replace the running statistics of a network's norms by their means over some batches.

        mean = 1/n sum_i mean_i        var = 1/n sum_i var_i

    where mean_i and var_i are what the norm computes from batch i in training mode. The network runs in evaluation mode
    without gradients, but for its norms: each normalizes by the statistics of the batch, as in training. So dropout
    does nothing, and no other buffer changes. On several ranks n counts the batches of all of them; every rank must
    call the function.

    Args:
        network: Any module. If it is a part of a network, or a thin network, the inputs are those of that part.
        inputs: What the network is called with, batch by batch; a norm over samples needs more than one of them.
        batches: How many batches are taken, at most, on each rank.
        frozen: Whether norms that are in evaluation mode get new statistics, too.

    Returns:
        The paths of the norms that ran. Others keep their statistics, and so do all norms that track none.

    Raises:
        ValueError: `batches` is below 1, or there is no batch. If the network raises an error, it stays as it was.

    Paper:
        Yu and Huang, Universally slimmable networks (1903.05134), section 3.3.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())
        >>> recalibrate(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])])
        ['0']
        >>> net[0].running_mean, net[0].running_var  # the means of 2 and 7, and of 2 and 8
        (tensor([4.5000]), tensor([5.]))
    """
    if batches < 1:
        raise ValueError(f"batches is the number of batches that are taken, and must be at least 1; got {batches!r}.")
    norms: dict[str, Any] = {
        name: one for name, one in network.named_modules() if tracks(one) and (frozen or one.training)
    }
    if not norms:
        return []
    device = next(iter(norms.values())).running_mean.device
    with evaluating(network), _tracking(norms.values()):
        ran = 0
        for some in islice(inputs, batches):
            ran += 1
            for norm in norms.values():
                if not _counts(norm):
                    norm.momentum = 1 / ran
            call(network, to_device(some, device))
        found = [_read(norm, ran) for norm in norms.values()]
    if not any(all_reduce_sum(torch.tensor([float(ran)], device=device)).tolist()):
        raise ValueError(f"There is no batch from which the norms of {type(network).__name__} could be recalibrated.")
    counts = all_reduce_sum(torch.stack([count for *_, count in found]))
    sums = all_reduce_sum(torch.cat([(part * count).reshape(-1) for *parts, count in found for part in parts]))
    means = iter(torch.split(sums, [norm.num_features for norm in norms.values() for _ in range(2)]))
    for norm, count in zip(norms.values(), counts.tolist(), strict=True):
        mean, var = next(means), next(means)
        if count:
            norm.running_mean.copy_(mean / count)
            norm.running_var.copy_(var / count)
            if _counts(norm):
                norm.num_batches_tracked.fill_(int(count))
    return [name for name, count in zip(norms, counts.tolist(), strict=True) if count]


def _counts(norm: Any) -> bool:
    """Whether the norm counts its batches; instance norms do not, and have no cumulative mean of their own."""
    return not isinstance(norm, nn.modules.instancenorm._InstanceNorm) and norm.num_batches_tracked is not None


@contextmanager
def _tracking(norms: Iterable[Any]) -> Iterator[None]:
    """Reset norms and keep them in training mode with cumulative means, whatever mode the network gets meanwhile."""
    with ExitStack() as back:
        for norm in norms:
            back.callback(setattr, norm, "momentum", norm.momentum)
            back.callback(vars(norm).pop, "train", None)
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None
            vars(norm)["train"] = lambda mode=True, norm=norm: norm
        yield


def _read(norm: Any, ran: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean and variance of a norm, and of how many batches they are the means."""
    mean, var = (one.to(torch.float64, copy=True) for one in (norm.running_mean, norm.running_var))
    if _counts(norm):
        return mean, var, norm.num_batches_tracked.double()
    return mean, var, mean.new_tensor(ran if bool((mean != 0).any() | (var != 1).any()) else 0)
