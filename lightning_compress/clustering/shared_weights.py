"""Shared weights: a table of a few values, and for every weight the index of its value.

    gradient of a value   =  mean (or sum) of the gradients of the weights that share it
    value after a step    =  mean of those weights, which are then equal again
    index 0               =  exact zeros, made by pruning: they stay, and share nothing

The optimizer goes on with the user's own parameters: the shared gradient is written into each of their `.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_compress.clustering.kmeans import Init, assign, index_dtype, kmeans
from lightning_compress.core.keep_largest import chunk_size

GradientRule = Literal["sum", "mean"]


class Clustered(NamedTuple):
    """A tensor as a table and an index per weight: the weights are `codebook[indices]`."""

    codebook: Tensor
    indices: Tensor


def cluster_weights(
    weight: Tensor, n_clusters: int, *, init: Init = "optimal", keep_zero: bool = False, name: str = "weight"
) -> Clustered:
    """Return the `n_clusters` values that stand best for a tensor, and which of them each weight takes.

    The values c minimise the sum over weights w of min over j of (w - c_j)^2.

    Args:
        weight: A tensor of any shape; it stays as it is.
        n_clusters: How many values; fewer, with a warning, where there are fewer distinct weights.
        init: As for `kmeans`.
        keep_zero: Exact zeros stay zero: they get index 0, and a value of their own that is not counted.
        name: What error messages call the tensor.

    Raises:
        ValueError: As `kmeans`.

    References:
        Han et al. 2016, "Deep Compression", section 3.

    Example:
        >>> w = torch.tensor([[0.5, 1.3, 4.3, -0.1], [0.1, -0.2, -1.2, 0.3], [1.0, 3.0, -0.4, 0.1],
        ...                   [-0.5, -0.1, -3.4, -5.0]])
        >>> codebook, indices = cluster_weights(w, 4)
        >>> codebook
        tensor([-4.2000, -0.2875,  0.7750,  3.6500])
        >>> indices
        tensor([[2, 2, 3, 1],
                [1, 1, 1, 2],
                [2, 3, 1, 1],
                [1, 1, 0, 0]], dtype=torch.uint8)
        >>> compression_rate(w.numel(), len(codebook))  # 512 bits become 16 * 2 + 4 * 32
        3.2
    """
    means = kmeans(weight, n_clusters, init=init, keep_zero=keep_zero, names=[name])
    return Clustered(means.to(weight), assign(weight, means, keep_zero=keep_zero))


def compression_rate(n: int, k: int, *, bits: int = 32) -> float:
    """Return Deep Compression's rate r = n b / (n log2(k) + k b) of n weights of b bits that share k values.

    It counts a table and an index of log2(k) bits per weight, and no entropy coding: a file may be smaller.

    Example:
        >>> round(compression_rate(266_200, 32), 2)
        6.4
    """
    return n * bits / (n * math.log2(k) + k * bits)


@torch.no_grad()
def sum_by_cluster(values: Tensor, index: Tensor, n_clusters: int) -> Tensor:
    """Return the sum of the values of every cluster, in float64, whatever the values' type, and without random order.

    Args:
        values: A tensor of any shape.
        index: For each of its entries a cluster, in the same shape.
        n_clusters: How many clusters there are.

    Example:
        >>> sum_by_cluster(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0]), 3)
        tensor([5., 0., 2.], dtype=torch.float64)
    """
    sums = torch.zeros(n_clusters, dtype=torch.float64, device=values.device)
    for some, at in zip(_chunks(values), _chunks(index), strict=True):
        if values.device.type == "cpu":
            sums += torch.bincount(at, some.double(), minlength=n_clusters)
        else:
            sums.index_put_((at.long(),), some.double(), accumulate=True)  # sorts, so that ranks get the same bits
    return sums


class SharedWeights:
    """Parameters that take their values from one table; they hold codebook[index] between steps.

    Args:
        parameters: The parameters, by name. Their identity never changes.
        codebook: The values; the first is 0 and stands for what is pruned.
        index: For each parameter its entries' positions in the table.

    Attributes:
        codebook: The values now, float64.
        index: As given, in the smallest type that holds it.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.9, -2.0, 1.1, 0.0]])
        >>> shared = SharedWeights.cluster({"weight": layer.weight}, 2)
        >>> layer.weight.data
        tensor([[ 1., -2.,  1.,  0.]])
        >>> layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).backward()
        >>> shared.share_gradients("sum"); layer.weight.grad
        tensor([[4., 2., 4., 0.]])
        >>> torch.optim.SGD(layer.parameters(), lr=0.1).step(); shared.share_values(); layer.weight.data
        tensor([[ 0.6000, -2.2000,  0.6000,  0.0000]])
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], codebook: Tensor, index: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        device = next(iter(self.parameters.values())).device
        self.codebook = codebook.to(device, torch.float64)
        dtype = index_dtype(len(codebook))
        self.index = {name: index[name].to(device, dtype).contiguous() for name in self.parameters}
        self._count()

    @classmethod
    def cluster(
        cls, parameters: Mapping[str, nn.Parameter], n_clusters: int, *, init: Init = "optimal"
    ) -> SharedWeights:
        """Cluster the parameters together and set each entry to its cluster's mean; exact zeros stay zero.

        Raises:
            ValueError: As `kmeans`.
        """
        tensors = [parameter.detach() for parameter in parameters.values()]
        means = kmeans(tensors, n_clusters, init=init, keep_zero=True, names=list(parameters))
        return cls.nearest(parameters, means)

    @classmethod
    def nearest(cls, parameters: Mapping[str, nn.Parameter], means: Tensor) -> SharedWeights:
        """Let each entry join the nearest of the means that `kmeans` returned with `keep_zero`."""
        index = {name: assign(parameter, means, keep_zero=True) for name, parameter in parameters.items()}
        shared = cls(parameters, means, index)
        shared.share_values()
        return shared

    @torch.no_grad()
    def share_gradients(self, rule: GradientRule = "mean", *, behind: Mapping[str, Tensor] | None = None) -> None:
        """Give every weight the gradient of its value: the mean, or the sum, over the cluster. Zeros get none.

        A parameter without a gradient is left out, and gets one where it shares values with others that have one.

        Args:
            rule: "mean" or "sum".
            behind: As for `take_zeros`.
        """
        self.take_zeros(behind)
        present = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not present:
            return
        sums = self._sums(present)
        if rule == "mean":
            sums /= self._counts.clamp(min=1.0)
        sums[0] = 0.0
        for name, parameter in self.parameters.items():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
            if parameter.grad is not None:
                self._look_up(sums, name, parameter.grad)

    @torch.no_grad()
    def share_values(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Set every weight to the mean over its cluster, and the zeros to zero.

        Args:
            tensors: Others of the same names and shapes, such as averages; by default the parameters, whose means then
                are the codebook.
        """
        given = self.parameters if tensors is None else tensors
        means = self._sums(given) / self._counts.clamp(min=1.0)
        means[0] = 0.0
        for name in self.parameters:
            self._look_up(means, name, given[name])
        if tensors is None:
            self.codebook = means
            self._zeros = self._zeros_of_codebook()

    @torch.no_grad()
    def take_zeros(self, behind: Mapping[str, Tensor] | None = None) -> None:
        """Let entries that have become exactly zero leave their clusters for good: something has pruned them.

        Args:
            behind: The shared values by parameter, where parameters hold something else for now, as on a grid.
        """
        held = {name: (behind or {}).get(name, parameter.detach()) for name, parameter in self.parameters.items()}
        if sum(map(_count_zeros, held.values())) == self._zeros:
            return
        for name, tensor in held.items():
            values = self.codebook.to(tensor.dtype).index_select(0, self.index[name].flatten().int())
            gone = (tensor == 0) & (values != 0).view_as(tensor)  # a mean may happen to be zero
            self.index[name].masked_fill_(gone, 0)
        self._count()

    def holds(self) -> bool:
        """Whether the weights of every cluster are equal, as they are after every step."""
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.share_values(before)
        return all(torch.equal(before[name], parameter.detach()) for name, parameter in self.parameters.items())

    @property
    def n_values(self) -> int:
        """How many different values the weights take, zero included."""
        return int((self._counts > 0).sum())

    @property
    def bits_per_weight(self) -> float:
        """Deep Compression's count, b / r: an index of log2(k) bits each, and the table's share."""
        n = sum(parameter.numel() for parameter in self.parameters.values())
        bits = max(torch.finfo(parameter.dtype).bits for parameter in self.parameters.values())
        return bits / compression_rate(n, self.n_values, bits=bits)

    def _count(self) -> None:
        one = torch.ones((), dtype=torch.float64, device=self.codebook.device)
        ones = {name: one.expand(index.shape) for name, index in self.index.items()}
        self._counts = self._sums(ones)
        self._zeros = self._zeros_of_codebook()

    def _zeros_of_codebook(self) -> int:
        """How many weights are zero while nothing but this object has written them."""
        dtype = next(iter(self.parameters.values())).dtype
        return int(self._counts[self.codebook.to(dtype) == 0].sum())

    def _sums(self, tensors: Mapping[str, Tensor]) -> Tensor:
        sums = [
            sum_by_cluster(tensor.detach(), self.index[name], len(self.codebook))
            for name, tensor in tensors.items()
            if name in self.index
        ]
        return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]

    def _look_up(self, table: Tensor, name: str, out: Tensor) -> None:
        """Write table[index] into a tensor of the parameter's shape."""
        table, out = table.to(out), out.detach()
        flat = out.view(-1) if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        for part, at in zip(_chunks(flat), _chunks(self.index[name]), strict=True):
            torch.index_select(table, 0, at.int(), out=part)
        if not out.is_contiguous():
            out.copy_(flat)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.reshape(-1), chunk_size(tensor.device))


def _count_zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.stack([part.count_nonzero() for part in _chunks(tensor)]).sum())


def check_rule(rule: str) -> None:
    """Raise a ValueError unless `rule` says how gradients are shared."""
    if rule not in get_args(GradientRule):
        raise ValueError(f"gradient must be 'sum' or 'mean' over the cluster; got {rule!r}.")
