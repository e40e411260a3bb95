"""The forms that a layer of low rank takes: two or three ordinary layers, one after the other, in the layer's place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress.replacement.layer import CONVS, LayerShape, linear_map
from lightning_compress.replacement.swap import Replaced

Numbers = Mapping[str, int]
PACKED = 3  # queries, keys and values


class LowRankForm(Replaced):
    """A layer as a product of thin ones.

    Attributes:
        names: The names of its numbers.
        part_names: The names of its parts.
    """

    names: ClassVar[tuple[str, ...]] = ("rank",)
    part_names: ClassVar[tuple[str, ...]] = ("first", "second")

    @classmethod
    def refused(cls, of: LayerShape) -> str | None:
        """Return why a layer can't take this form, whatever the rank; None if it can."""
        raise NotImplementedError(f"{cls.__name__} must supply refused().")

    @classmethod
    def most(cls, of: LayerShape) -> tuple[int, ...]:
        """Return the highest of each of its numbers, with which the layer computes what it did; of each group."""
        raise NotImplementedError(f"{cls.__name__} must supply most().")

    @classmethod
    def check(cls, of: LayerShape, numbers: Mapping[str, Any]) -> None:
        if (reason := cls.refused(of)) is not None:
            raise ValueError(f"the form {cls.form!r} does not fit: {reason}.")
        if set(numbers) != set(cls.names):
            raise ValueError(f"the form {cls.form!r} has the numbers {', '.join(cls.names)}; got {dict(numbers)!r}.")
        for name, most in zip(cls.names, cls.most(of), strict=True):
            if type(numbers[name]) is not int or not 1 <= numbers[name] <= most:
                raise ValueError(f"{name} must be from 1 to {most}; got {numbers[name]!r}.")

    @classmethod
    def chains(cls, parts: Mapping[str, nn.Module]) -> list[list[nn.Module]]:
        """Return the parts that run one after the other from the layer's input, in lists."""
        return [list(parts.values())]

    @classmethod
    def product(cls, *weights: Tensor) -> Tensor:
        """Return the weight of one group, in the layout of `LinearMap`, from the weights of its parts."""
        raise NotImplementedError(f"{cls.__name__} must supply product().")

    def dense_weight(self) -> tuple[Tensor, Tensor | None]:
        maps = [linear_map(part) for part in self.children()]
        groups = maps[0].groups
        weights = [one.weight.reshape(groups, -1, *one.weight.shape[1:]) for one in maps]
        whole = torch.cat([self.product(*of_group) for of_group in zip(*weights, strict=True)])
        return whole, maps[-1].bias


class LowRankLinear(LowRankForm):
    """A linear layer as two: to r features, and from them to the outputs."""

    form = "linear"

    @classmethod
    def refused(cls, of: LayerShape) -> str | None:
        return None if of.kind == "linear" else f"it is for linear layers, and this is one of kind {of.kind}"

    @classmethod
    def most(cls, of: LayerShape) -> tuple[int, ...]:
        return (min(of.shape),)

    @classmethod
    def parts(cls, of: LayerShape, numbers: Mapping[str, Any]) -> dict[str, nn.Module]:
        where: dict[str, Any] = {"dtype": of.dtype, "device": of.device}
        return {
            "first": nn.Linear(of.inputs, numbers["rank"], bias=False, **where),
            "second": nn.Linear(numbers["rank"], of.outputs, bias=of.bias, **where),
        }

    @classmethod
    def product(cls, *weights: Tensor) -> Tensor:
        first, second = weights
        return second @ first


class PackedLowRankLinear(LowRankLinear):
    """A linear layer that returns queries, keys and values, each of which gets a rank of its own."""

    form = "packed"
    names: ClassVar[tuple[str, ...]] = ("rank_0", "rank_1", "rank_2")

    @classmethod
    def refused(cls, of: LayerShape) -> str | None:
        if (reason := super().refused(of)) is not None:
            return reason
        return None if of.outputs == PACKED * of.inputs else f"it has not {PACKED} times as many outputs as inputs"

    @classmethod
    def most(cls, of: LayerShape) -> tuple[int, ...]:
        return (of.inputs,) * PACKED

    @classmethod
    def parts(cls, of: LayerShape, numbers: Mapping[str, Any]) -> dict[str, nn.Module]:
        third = replace(of, shape=(of.outputs // PACKED, of.inputs))
        found = [super(PackedLowRankLinear, cls).parts(third, {"rank": numbers[name]}) for name in cls.names]
        return {f"{name}_{k}": part for k, parts in enumerate(found) for name, part in parts.items()}

    @classmethod
    def chains(cls, parts: Mapping[str, nn.Module]) -> list[list[nn.Module]]:
        layers = list(parts.values())
        return [layers[2 * k : 2 * k + 2] for k in range(PACKED)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([second(first(x)) for first, second in self.chains(self._parts())], -1)

    def dense_weight(self) -> tuple[Tensor, Tensor | None]:
        maps = [[linear_map(one) for one in chain] for chain in self.chains(self._parts())]
        biases = [second.bias for _, second in maps if second.bias is not None]
        whole = torch.cat([self.product(first.weight, second.weight) for first, second in maps])
        return whole, torch.cat(biases) if biases else None

    def widths(self) -> tuple[int, int]:
        maps = [linear_map(one).sizes for one in self.children()]
        return maps[0].inputs, sum(one.outputs for one in maps[1::2])

    def _parts(self) -> dict[str, nn.Module]:
        return dict(self.named_children())


class TiedLowRankLinear(LowRankLinear):
    """An output matrix whose weight was an embedding's: the long factor is still that of the embedding."""

    form = "tied_linear"
    shares: ClassVar[Mapping[str, str]] = {"second.weight": "entries"}


class LowRankEmbedding(LowRankForm):
    """An embedding as one of r features for each entry, and a linear layer from them to its width."""

    form = "embedding"

    @classmethod
    def refused(cls, of: LayerShape) -> str | None:
        return None if of.kind == "embedding" else f"it is for embeddings, and this is a layer of kind {of.kind}"

    @classmethod
    def most(cls, of: LayerShape) -> tuple[int, ...]:
        return (min(of.shape),)

    @classmethod
    def parts(cls, of: LayerShape, numbers: Mapping[str, Any]) -> dict[str, nn.Module]:
        where: dict[str, Any] = {"dtype": of.dtype, "device": of.device}
        return {
            "first": nn.Embedding(of.inputs, numbers["rank"], of.padding_idx, **where),
            "second": nn.Linear(numbers["rank"], of.outputs, bias=False, **where),
        }

    @classmethod
    def product(cls, *weights: Tensor) -> Tensor:
        first, second = weights
        return first @ second.T


class TiedLowRankEmbedding(LowRankEmbedding):
    """An embedding whose weight was an output matrix's: the long factor is still that of the output matrix."""

    form = "tied_embedding"
    shares: ClassVar[Mapping[str, str]] = {"first.weight": "entries"}


class LowRankConv(LowRankForm):
    """A convolution as several. One with groups becomes several with as many groups; ranks are those of each group."""

    @classmethod
    def refused(cls, of: LayerShape) -> str | None:
        return None if of.kind == "conv" else f"it is for convolutions, and this is a layer of kind {of.kind}"


class ChannelConv(LowRankConv):
    """A convolution as one with the same kernel to r channels, and one of size 1 to the outputs."""

    form = "channel"

    @classmethod
    def most(cls, of: LayerShape) -> tuple[int, ...]:
        return (min(of.shape[0] // of.groups, math.prod(of.shape[1:])),)

    @classmethod
    def parts(cls, of: LayerShape, numbers: Mapping[str, Any]) -> dict[str, nn.Module]:
        width = numbers["rank"] * of.groups
        return {
            "first": conv_like(of, of.inputs, width, of.kernel, of.stride, of.padding, of.dilation),
            "second": conv_like(of, width, of.outputs, bias=of.bias),
        }

    @classmethod
    def product(cls, *weights: Tensor) -> Tensor:
        first, second = weights
        return (second.flatten(1) @ first.flatten(1)).reshape(-1, *first.shape[1:])


class SpatialConv(LowRankConv):
    """A convolution of images as a vertical one to r channels, and a horizontal one to the outputs."""

    form = "spatial"

    @classmethod
    def refused(cls, of: LayerShape) -> str | None:
        if (reason := super().refused(of)) is not None:
            return reason
        if len(of.kernel) != 2 or min(of.kernel) == 1:
            return f"it needs a kernel with two sizes above 1, and this one has {_times(of.kernel)}"
        return None

    @classmethod
    def most(cls, of: LayerShape) -> tuple[int, ...]:
        n_out, n_in, height, width = of.shape
        return (min(n_out // of.groups * width, n_in * height),)

    @classmethod
    def parts(cls, of: LayerShape, numbers: Mapping[str, Any]) -> dict[str, nn.Module]:
        middle = numbers["rank"] * of.groups
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = of.kernel, of.stride, of.padding, of.dilation
        return {
            "first": conv_like(of, of.inputs, middle, (kh, 1), (sh, 1), (ph, 0), (dh, 1)),
            "second": conv_like(of, middle, of.outputs, (1, kw), (1, sw), (0, pw), (1, dw), bias=of.bias),
        }

    @classmethod
    def product(cls, *weights: Tensor) -> Tensor:
        first, second = weights
        return torch.einsum("riy,orx->oiyx", first[..., 0], second[:, :, 0])


class TuckerConv(LowRankConv):
    """A convolution as one of size 1, one with its kernel between fewer channels, and one of size 1 (Tucker-2)."""

    form = "tucker"
    names: ClassVar[tuple[str, ...]] = ("rank_in", "rank_out")
    part_names: ClassVar[tuple[str, ...]] = ("first", "core", "last")

    @classmethod
    def refused(cls, of: LayerShape) -> str | None:
        if (reason := super().refused(of)) is not None:
            return reason
        return "its kernel has size 1, for which the channel split is all" if math.prod(of.kernel) == 1 else None

    @classmethod
    def most(cls, of: LayerShape) -> tuple[int, ...]:
        return of.shape[1], of.shape[0] // of.groups

    @classmethod
    def parts(cls, of: LayerShape, numbers: Mapping[str, Any]) -> dict[str, nn.Module]:
        low, high = numbers["rank_in"] * of.groups, numbers["rank_out"] * of.groups
        return {
            "first": conv_like(of, of.inputs, low),
            "core": conv_like(of, low, high, of.kernel, of.stride, of.padding, of.dilation),
            "last": conv_like(of, high, of.outputs, bias=of.bias),
        }

    @classmethod
    def product(cls, *weights: Tensor) -> Tensor:
        first, core, last = (one.flatten(2) for one in weights)
        return torch.einsum("rit,srk,ost->oik", first, core, last).reshape(len(last), -1, *weights[1].shape[2:])


FORMS: Mapping[str, type[LowRankForm]] = {
    one.form: one
    for one in (
        LowRankLinear,
        PackedLowRankLinear,
        TiedLowRankLinear,
        LowRankEmbedding,
        TiedLowRankEmbedding,
        ChannelConv,
        SpatialConv,
        TuckerConv,
    )
}


def conv_like(
    of: LayerShape,
    n_in: int,
    n_out: int,
    kernel: tuple[int, ...] | None = None,
    stride: tuple[int, ...] | None = None,
    padding: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    *,
    bias: bool = False,
) -> nn.Module:
    """Return a convolution with as many dimensions and groups as a layer; what is not given does nothing."""
    ones = (1,) * len(of.kernel)
    kind = cast(Any, CONVS[len(of.kernel)])
    made: nn.Module = kind(
        n_in,
        n_out,
        ones if kernel is None else kernel,
        ones if stride is None else stride,
        (0,) * len(ones) if padding is None else padding,
        ones if dilation is None else dilation,
        of.groups,
        bias,
        of.padding_mode if padding is not None and any(padding) else "zeros",
        dtype=of.dtype,
        device=of.device,
    )
    return made


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
