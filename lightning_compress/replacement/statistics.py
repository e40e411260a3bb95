"""What layers see: the mean and the covariance of their inputs, or of the patches that a kernel takes from them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.distributed import all_reduce_sum
from lightning_compress.core.example_inputs import ExampleInputs, call, to_device
from lightning_compress.core.hooks import hooked
from lightning_compress.replacement.find import plainly
from lightning_compress.replacement.layer import LayerShape, linear_map

_CHUNK = 2**24  # numbers in one piece of patches
_LARGE = 2**30  # bytes of one layer's covariance, above which they are told
POSITIONS = 4096  # rows that a batch adds to the statistics of one layer, by default
log = logging.getLogger(__name__)


class InputStatistics:
    """The mean m and the centred covariance C of what one layer sees, in float64, over the samples and their positions.

        m = E[x]        C = E[(x - m)(x - m)^T]

    where x is a row of a linear layer's input, or a patch: the `inputs / groups * prod(kernel)` numbers that a
    convolution multiplies by one row of its flattened weight, padding included. So y = W x + b for the weight
    W of `linear_map(layer).weight.flatten(1)`. A convolution in groups has statistics for each of them.

    An embedding sees entries: its mean is how often each one came, and its covariance would be as large as their
    number squared, and is not kept.

    Attributes:
        of: The sizes of the layer.
        count: How many rows were seen.
    """

    def __init__(self, of: LayerShape) -> None:
        self.of = of
        self.count = 0
        size = of.inputs if of.kind == "embedding" else math.prod(of.shape[1:])
        where: dict[str, Any] = {"dtype": torch.float64, "device": of.device}
        self._mean = torch.zeros(of.groups, size, **where)
        self._scatter = None if of.kind == "embedding" else torch.zeros(of.groups, size, size, **where)

    @property
    def mean(self) -> Tensor:
        """The mean m: (size,), or (groups, size) for a convolution in groups."""
        return self._mean if self.of.groups > 1 else self._mean[0]

    @property
    def covariance(self) -> Tensor:
        """The covariance C: (size, size), or (groups, size, size).

        Raises:
            ValueError: The layer is an embedding, or has seen nothing.
        """
        if self._scatter is None:
            raise ValueError("An embedding's covariance is not kept: its `mean` has the frequencies of its entries.")
        if self.count == 0:
            raise ValueError("The layer has seen no inputs.")
        return (self._scatter if self.of.groups > 1 else self._scatter[0]) / self.count

    def add(self, x: Tensor, *, limit: int | None = None, generator: torch.Generator | None = None) -> None:
        """Take the input of one call into account.

        Args:
            x: What the layer was called with.
            limit: At most so many rows, which are drawn; None: all.
            generator: Draws them.
        """
        if self.of.kind == "embedding":
            counts = torch.bincount(x.reshape(-1), minlength=self.of.inputs).to(self._mean)
            self._join(int(x.numel()), counts[None] / max(x.numel(), 1), None)
            return
        for rows in self._rows(x, limit, generator):
            mean = rows.mean(1)
            centred = rows - mean[:, None]
            self._join(rows.shape[1], mean, centred.mT @ centred)

    def merge(self, other: InputStatistics) -> None:
        """Add what another one has seen, of the same layer with other data."""
        self._join(other.count, other._mean, other._scatter)

    def gather(self) -> None:
        """Merge the statistics of all ranks, on all of them."""
        count = int(all_reduce_sum(torch.tensor([self.count], device=self._mean.device)).item())
        if count == 0:
            return
        mean = all_reduce_sum(self._mean * (self.count / count))
        if self._scatter is not None:
            off = self._mean - mean
            self._scatter = all_reduce_sum(self._scatter + self.count * off[:, :, None] * off[:, None])
        self.count, self._mean = count, mean

    def _join(self, count: int, mean: Tensor, scatter: Tensor | None) -> None:
        """Merge by Chan's formula, which subtracts no large numbers from one another."""
        if count == 0:
            return
        total = self.count + count
        off = mean - self._mean
        self._mean = self._mean + off * (count / total)
        if self._scatter is not None:
            assert scatter is not None
            self._scatter += scatter
            self._scatter += (self.count * count / total) * off[:, :, None] * off[:, None]
        self.count = total

    def _rows(self, x: Tensor, limit: int | None, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Yield the rows of an input in pieces, as (groups, rows, size)."""
        parts = x.detach().reshape(-1, 1, x.shape[-1]) if self.of.kind == "linear" else patches(x.detach(), self.of)
        positions = parts.shape[: -len(self.of.kernel) - 1] if self.of.kernel else parts.shape[:2]
        number = math.prod(positions)
        chosen = None
        if limit is not None and number > limit:
            chosen = torch.randperm(number, generator=generator)[:limit].sort().values.to(x.device)
        total = number if chosen is None else len(chosen)
        step = max(1, _CHUNK // self._mean.numel())
        for start in range(0, total, step):
            stop = min(start + step, total)
            where = torch.arange(start, stop, device=x.device) if chosen is None else chosen[start:stop]
            rows = parts[torch.unravel_index(where, positions)].to(torch.float64)
            yield rows.reshape(len(where), self.of.groups, -1).transpose(0, 1)


def patches(x: Tensor, of: LayerShape) -> Tensor:
    """Return the patches that a convolution sees, padding included, as (samples, *positions, channels, *kernel).

    Example:
        >>> layer = nn.Conv1d(1, 1, 2, dilation=2)
        >>> patches(torch.arange(4.0).view(1, 1, 4), linear_map(layer).sizes)[0, :, 0]
        tensor([[0., 2.],
                [1., 3.]])
    """
    if x.dim() == len(of.kernel) + 1:
        x = x.unsqueeze(0)  # one sample without the dimension of samples
    both = [size for one in reversed(of.padding) for size in (one, one)]
    if any(both):
        x = F.pad(x, both, mode="constant" if of.padding_mode == "zeros" else of.padding_mode)
    for k, (size, stride, dilation) in enumerate(zip(of.kernel, of.stride, of.dilation, strict=True)):
        x = x.unfold(k + 2, dilation * (size - 1) + 1, stride)[..., ::dilation]
    n = len(of.kernel)
    return x.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))


def gather_statistics(
    network: nn.Module,
    layers: Iterable[str],
    batches: Iterable[ExampleInputs],
    *,
    limit: int | None = POSITIONS,
    seed: int = 0,
) -> dict[str, InputStatistics]:
    """Return the statistics of the inputs of layers, by path, over some batches and over all ranks.

    The network runs in evaluation mode without gradients, and stays as it is; random states stay as well. A layer that
    runs several times in a forward pass counts all its inputs. On several ranks, every rank must call the function.

    Args:
        network: The network.
        layers: Paths of linear layers, convolutions and embeddings.
        batches: What the network is called with.
        limit: How many rows or patches a call of a layer adds, at most; they are drawn by an own generator. None: all.
        seed: Of that generator.

    Raises:
        UnreplaceableError: A layer is no linear map.
        ValueError: A layer has seen no inputs, on any rank.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> found = gather_statistics(net, ["0"], [torch.tensor([[1.0, 0.0], [3.0, 4.0]])])["0"]
        >>> found.count, found.mean, found.covariance
        (2, tensor([2., 2.], dtype=torch.float64), tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64))
    """
    modules = {path: network.get_submodule(path) for path in layers}
    found = {path: InputStatistics(linear_map(module).sizes) for path, module in modules.items()}
    generator = torch.Generator().manual_seed(seed)
    _say_large(found)

    def watch(one: InputStatistics, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        one.add(x, limit=limit, generator=generator)

    handles = [
        module.register_forward_pre_hook(partial(watch, found[path]), with_kwargs=True)
        for path, module in modules.items()
    ]
    device = next(iter(network.parameters())).device
    with hooked(*handles), plainly(network):
        for batch in batches:
            call(network, to_device(batch, device))
    for one in found.values():
        one.gather()
    if unseen := [path for path, one in found.items() if one.count == 0]:
        raise ValueError(
            f"{', '.join(unseen[:3])}{f' and {len(unseen) - 3} more' if unseen[3:] else ''} saw no inputs: the batches "
            f"never reach them, or there are no batches."
        )
    return found


def _say_large(found: Mapping[str, InputStatistics]) -> None:
    sizes = {path: 0 if one._scatter is None else one._scatter.nbytes for path, one in found.items()}
    large = {path: size for path, size in sizes.items() if size > _LARGE}
    for path, size in large.items():
        log.warning("The covariance of what %s sees takes %.1f GiB of memory.", path, size / 2**30)
