"""Shared weights: a codebook of a few values, and for each weight the index of its value.

    gradient of a value   =  mean (or sum) of the gradients of the weights in its cluster
    value after a step    =  mean of those weights, which thereby become equal again
    index 0               =  exact zeros, made by pruning: they stay zero and belong to no cluster

The optimizer steps the user's own parameters: the shared gradient is written into their `.grad`.
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
    """A clustered tensor, `codebook[indices]`.

    Attributes:
        codebook: The shared values.
        indices: For each weight the position of its value in the codebook, in the tensor's shape.
    """

    codebook: Tensor
    indices: Tensor


def cluster_weights(
    weight: Tensor, n_clusters: int, *, init: Init = "optimal", keep_zero: bool = False, name: str = "weight"
) -> Clustered:
    """Return the `n_clusters` values that approximate a tensor best, and the index of each weight's value.

    The values c minimise the sum over weights w of min over j of (w - c_j)^2.

    Args:
        weight: A tensor of any shape, which is not changed.
        n_clusters: The number of values. If there are fewer distinct weights, these are the values, with a warning.
        init: How the values are initialised, as for `kmeans`.
        keep_zero: Whether exact zeros stay zero. They then get index 0 and a value that `n_clusters` does not count.
        name: The name of the tensor, for messages.

    Raises:
        ValueError: A weight is NaN or infinite, its dtype is not floating point, or `n_clusters` is below 1.

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
    """Return Deep Compression's compression rate r = n b / (n log2(k) + k b).

    The rate counts the codebook and an index of log2(k) bits per weight. With entropy coding a file may be smaller.

    Args:
        n: The number of weights.
        k: The number of values that the weights share.
        bits: The bits b of an uncompressed weight.

    Example:
        >>> round(compression_rate(266_200, 32), 2)
        6.4
    """
    return n * bits / (n * math.log2(k) + k * bits)


@torch.no_grad()
def sum_by_cluster(values: Tensor, index: Tensor, n_clusters: int) -> Tensor:
    """Return the sum of the values in each cluster, in float64; the order of the additions is deterministic.

    Args:
        values: A tensor of any shape.
        index: The cluster of each value, in the same shape.
        n_clusters: The number of clusters.

    Example:
        >>> sum_by_cluster(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0]), 3)
        tensor([5., 0., 2.], dtype=torch.float64)
    """
    sums = torch.zeros(n_clusters, dtype=torch.float64, device=values.device)
    for some, at in zip(_chunks(values), _chunks(index), strict=True):
        if values.device.type == "cpu":
            sums += torch.bincount(at, some.double(), minlength=n_clusters)
        else:
            sums.index_put_((at.long(),), some.double(), accumulate=True)  # deterministic: it sorts
    return sums


class SharedWeights:
    """Parameters that share the values of one codebook: between optimizer steps they hold codebook[index].

    Args:
        parameters: The parameters, by name. The same Parameter objects are kept.
        codebook: The shared values. The first is 0, the value of pruned weights.
        index: For each parameter, by name, the positions of its entries in the codebook.

    Attributes:
        codebook: The current shared values, as float64.
        index: The positions by parameter name, in the smallest integer type that holds them.

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

        Args:
            parameters: The parameters, by name.
            n_clusters: The number of shared values, zero not counted.
            init: How the values are initialised, as for `kmeans`.

        Raises:
            ValueError: A weight is NaN or infinite, its dtype is not floating point, or `n_clusters` is below 1.
        """
        tensors = [parameter.detach() for parameter in parameters.values()]
        means = kmeans(tensors, n_clusters, init=init, keep_zero=True, names=list(parameters))
        return cls.nearest(parameters, means)

    @classmethod
    def nearest(cls, parameters: Mapping[str, nn.Parameter], means: Tensor) -> SharedWeights:
        """Assign each entry to the nearest of the means that `kmeans` returned with `keep_zero=True`."""
        index = {name: assign(parameter, means, keep_zero=True) for name, parameter in parameters.items()}
        shared = cls(parameters, means, index)
        shared.share_values()
        return shared

    @torch.no_grad()
    def share_gradients(self, rule: GradientRule = "mean", *, behind: Mapping[str, Tensor] | None = None) -> None:
        """Replace each weight's gradient by the mean, or the sum, over its cluster; zeros get the gradient 0.

        A parameter without a gradient adds nothing to the sums. It gets a gradient if another parameter of this
        codebook has one.

        Args:
            rule: "mean" or "sum".
            behind: The shared values by parameter name, as for `take_zeros`.
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
        """Set each weight to the mean over its cluster, and pruned weights to zero.

        Args:
            tensors: Tensors of the same names and shapes to set instead, such as averages of the weights. By default
                the parameters are set, and their means become the codebook.
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
        """Move entries that have become exactly zero to index 0 for good: another technique has pruned them.

        Args:
            behind: The shared values by name, for parameters that currently hold other values, such as values
                quantized to a grid.
        """
        held = {name: (behind or {}).get(name, parameter.detach()) for name, parameter in self.parameters.items()}
        if sum(map(_count_zeros, held.values())) == self._zeros:
            return
        for name, tensor in held.items():
            values = self.codebook.to(tensor.dtype).index_select(0, self.index[name].flatten().int())
            gone = (tensor == 0) & (values != 0).view_as(tensor)  # where a cluster's mean is 0, zeros are no pruning
            self.index[name].masked_fill_(gone, 0)
        self._count()

    def holds(self) -> bool:
        """Return whether all weights of each cluster are equal, as they are after every step."""
        copies = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.share_values(copies)
        return all(torch.equal(copies[name], parameter.detach()) for name, parameter in self.parameters.items())

    @property
    def n_values(self) -> int:
        """The number of different values that the weights take, zero included."""
        return int((self._counts > 0).sum())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, b / `compression_rate`: an index of log2(k) bits and a share of the codebook."""
        n = sum(parameter.numel() for parameter in self.parameters.values())
        bits = max(torch.finfo(parameter.dtype).bits for parameter in self.parameters.values())
        return bits / compression_rate(n, self.n_values, bits=bits)

    def _count(self) -> None:
        one = torch.ones((), dtype=torch.float64, device=self.codebook.device)
        ones = {name: one.expand(index.shape) for name, index in self.index.items()}
        self._counts = self._sums(ones)
        self._zeros = self._zeros_of_codebook()

    def _zeros_of_codebook(self) -> int:
        """Return how many weights are zero as long as no other code writes to them."""
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
        """Write table[index] into `out`, which has the parameter's shape."""
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
    """Raise a ValueError unless `rule` is "sum" or "mean"."""
    if rule not in get_args(GradientRule):
        raise ValueError(f"gradient must be 'sum' or 'mean' over the cluster; got {rule!r}.")
