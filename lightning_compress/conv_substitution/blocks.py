"""The five blocks of cheaper convolutions that a convolution may become: its forms, their parts and what they cost.

K is the number of taps of the layer's kernel, I and O are its channels:

    separable  `terms` times: each input channel filtered by K taps; then 1x1 I -> O        MobileNet
    xception   1x1 I -> O; then each output channel filtered by K taps; `terms` times       Xception
    fire       1x1 I -> S; then 1x1 S -> O / 2 and K taps S -> O / 2, side by side          SqueezeNet
    ghost      K taps I -> O / ratio; then small filters of these for the other outputs     GhostNet
    shuffle    1x1 I -> H in groups; shuffle; each filtered by K taps; 1x1 H -> O in groups ShuffleNet

No block has a nonlinearity or a norm inside: what follows the layer follows the block. So each is one linear map, which
can begin close to what the layer computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.conv_substitution.decoupling import separable_weight, xception_weight
from lightning_compress.conv_substitution.shuffled import shuffle_weight
from lightning_compress.conv_substitution.squeezed import fire_weight
from lightning_compress.replacement.layer import CONVS, LayerShape
from lightning_compress.replacement.swap import Replaced

Numbers = Mapping[str, Any]
GHOST_SIZE = 3  # taps of a ghost's filter in each dimension, as in the paper


class Order(nn.Module):
    """Puts channels in another order: output channel o is input channel index[o]."""

    index: Tensor

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("index", torch.arange(channels, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


class Block(Replaced):
    """A convolution that has become a block of cheaper ones."""

    least: ClassVar[Mapping[str, int]]  # the smallest value of each of the form's numbers

    @classmethod
    def check(cls, of: LayerShape, numbers: Numbers) -> None:
        if of.kind != "conv":
            raise ValueError("it is no convolution")
        if of.groups != 1:
            raise ValueError(f"it has groups={of.groups}, and a block stands in for an ungrouped convolution")
        if math.prod(of.kernel) == 1:
            raise ValueError("it is a 1x1 convolution, which a block would only make larger")
        if set(numbers) != set(cls.least):
            raise ValueError(f"a block {cls.form!r} has the numbers {', '.join(cls.least)}; got {dict(numbers)}")
        for name, least in cls.least.items():
            if type(numbers[name]) is not int or numbers[name] < least:
                raise ValueError(f"{name} must be an integer from {least} on; got {numbers[name]!r}")

    @classmethod
    def check_most(cls, of: LayerShape, numbers: Numbers, name: str, channels: int) -> None:
        """Raise a ValueError where a number is larger than the rank of the matrix that it stands for."""
        most = min(channels, math.prod(of.kernel))
        if numbers[name] > most:
            raise ValueError(f"{name}={numbers[name]} is more than {most}, with which it would be exact")

    @classmethod
    def cost(cls, of: LayerShape, numbers: Numbers) -> tuple[int, int]:
        """Return how many weights run at each place of the input, and how many at each place of the output."""
        raise NotImplementedError

    @classmethod
    def parameters_of(cls, of: LayerShape, numbers: Numbers) -> int:
        """Return the number of the block's parameters."""
        return sum(cls.cost(of, numbers)) + (of.outputs if of.bias else 0)

    def widths(self) -> tuple[int, int]:
        convs = [one for one in self._modules.values() if isinstance(one, nn.modules.conv._ConvNd)]
        return convs[0].in_channels, convs[-1].out_channels


def _point(of: LayerShape, inputs: int, outputs: int, *, bias: bool = False, **options: Any) -> nn.Module:
    return CONVS[len(of.kernel)](inputs, outputs, 1, bias=bias, dtype=of.dtype, device=of.device, **options)


def _filters(of: LayerShape, inputs: int, outputs: int, *, bias: bool = False, groups: int = 1) -> nn.Module:
    """Return a convolution with the layer's kernel, stride and padding."""
    return CONVS[len(of.kernel)](
        inputs,
        outputs,
        of.kernel,  # type: ignore[arg-type]
        stride=of.stride,  # type: ignore[arg-type]
        padding=of.padding,  # type: ignore[arg-type]
        dilation=of.dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=bias,
        padding_mode=of.padding_mode,  # type: ignore[arg-type]
        dtype=of.dtype,
        device=of.device,
    )


def _matrix(conv: nn.Module) -> Tensor:
    weight = conv._parameters["weight"]
    assert weight is not None
    return weight.flatten(1)


def _numbered(name: str, n: int) -> str:
    return name if n == 0 else f"{name}{n + 1}"


class Separable(Block):
    """Filters of each input channel by itself, and a 1x1 convolution of them all."""

    form: ClassVar[str] = "separable"
    least: ClassVar[Mapping[str, int]] = {"terms": 1}

    @classmethod
    def check(cls, of: LayerShape, numbers: Numbers) -> None:
        super().check(of, numbers)
        cls.check_most(of, numbers, "terms", of.outputs)

    @classmethod
    def parts(cls, of: LayerShape, numbers: Numbers) -> dict[str, nn.Module]:
        terms, width = numbers["terms"], of.inputs  # torch's depthwise convolution with a multiplier is slow
        parts = {_numbered("depthwise", t): _filters(of, width, width, groups=width) for t in range(terms)}
        return parts | {"pointwise": _point(of, terms * width, of.outputs, bias=of.bias)}

    @classmethod
    def cost(cls, of: LayerShape, numbers: Numbers) -> tuple[int, int]:
        return 0, numbers["terms"] * of.inputs * (math.prod(of.kernel) + of.outputs)

    def forward(self, x: Tensor) -> Tensor:
        *filters, pointwise = self.children()
        filtered = [one(x) for one in filters]
        mixed: Tensor = pointwise(filtered[0] if len(filtered) == 1 else torch.cat(filtered, 1))
        return mixed

    def dense_weight(self) -> tuple[Tensor, Tensor | None]:
        *filters, pointwise = self.children()
        matrix = torch.unflatten(_matrix(pointwise), 1, (len(filters), -1))
        weight = separable_weight(matrix, torch.stack([_matrix(one) for one in filters]))
        return torch.unflatten(weight, 2, self.of.kernel), pointwise._parameters["bias"]


class Xception(Block):
    """A 1x1 convolution, and filters of each of its outputs by itself."""

    form: ClassVar[str] = "xception"
    least: ClassVar[Mapping[str, int]] = {"terms": 1}

    @classmethod
    def check(cls, of: LayerShape, numbers: Numbers) -> None:
        super().check(of, numbers)
        cls.check_most(of, numbers, "terms", of.inputs)

    @classmethod
    def parts(cls, of: LayerShape, numbers: Numbers) -> dict[str, nn.Module]:
        terms, width = numbers["terms"], of.outputs
        parts: dict[str, nn.Module] = {"pointwise": _point(of, of.inputs, terms * width)}
        for t in range(terms):
            parts[_numbered("depthwise", t)] = _filters(of, width, width, groups=width, bias=of.bias and t == 0)
        return parts

    @classmethod
    def cost(cls, of: LayerShape, numbers: Numbers) -> tuple[int, int]:
        terms = numbers["terms"]
        return terms * of.inputs * of.outputs, terms * math.prod(of.kernel) * of.outputs

    def forward(self, x: Tensor) -> Tensor:
        pointwise, *filters = self.children()
        mixed = pointwise(x).chunk(len(filters), 1)
        found: Tensor = filters[0](mixed[0])
        for one, some in zip(filters[1:], mixed[1:], strict=True):
            found = found + one(some)
        return found

    def dense_weight(self) -> tuple[Tensor, Tensor | None]:
        pointwise, *filters = self.children()
        matrix = torch.unflatten(_matrix(pointwise), 0, (len(filters), -1))
        weight = xception_weight(matrix, torch.stack([_matrix(one) for one in filters]))
        return torch.unflatten(weight, 2, self.of.kernel), filters[0]._parameters["bias"]


class Fire(Block):
    """A 1x1 convolution to few channels, of which half of the outputs see one place and half the full kernel."""

    form: ClassVar[str] = "fire"
    least: ClassVar[Mapping[str, int]] = {"squeeze": 1}

    @classmethod
    def check(cls, of: LayerShape, numbers: Numbers) -> None:
        super().check(of, numbers)
        if any(size % 2 == 0 for size in of.kernel):
            raise ValueError(f"its kernel of {of.kernel} has no centre, where the 1x1 part of a fire module would be")
        if of.outputs < 2:
            raise ValueError("it has one output, which a fire module can't divide into two parts")
        if numbers["squeeze"] > of.inputs:
            raise ValueError(f"squeeze must be at most its {of.inputs} inputs; got {numbers['squeeze']}")

    @classmethod
    def parts(cls, of: LayerShape, numbers: Numbers) -> dict[str, nn.Module]:
        width, points = numbers["squeeze"], of.outputs // 2
        return {
            "squeeze": _point(of, of.inputs, width),
            "expand1": _point(
                of,
                width,
                points,
                bias=of.bias,
                stride=of.stride,
                padding=tuple(max(0, one) for one in _margins(of)),
                padding_mode=of.padding_mode,
            ),
            "expand": _filters(of, width, of.outputs - points, bias=of.bias),
            "order": Order(of.outputs, of.device),
        }

    @classmethod
    def cost(cls, of: LayerShape, numbers: Numbers) -> tuple[int, int]:
        width, points = numbers["squeeze"], of.outputs // 2
        return of.inputs * width, width * points + math.prod(of.kernel) * width * (of.outputs - points)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.squeeze(x)
        centre = squeezed
        for dim, margin in enumerate(_margins(self.of), start=2):
            if margin < 0:  # the kernel's centre never reaches the border
                centre = centre.narrow(dim, -margin, centre.shape[dim] + 2 * margin)
        ordered: Tensor = self.order(torch.cat([self.expand1(centre), self.expand(squeezed)], 1))
        return ordered

    def dense_weight(self) -> tuple[Tensor, Tensor | None]:
        points, filters = self.expand1.weight.flatten(2), self.expand.weight.flatten(2)
        side = filters.shape[2] // 2
        expand = torch.cat([nn.functional.pad(points, (side, side)), filters])[self.order.index]
        biases = torch.cat([self.expand1.bias, self.expand.bias])[self.order.index] if self.of.bias else None
        weight = fire_weight(self.squeeze.weight.flatten(1), expand)
        return torch.unflatten(weight, 2, self.of.kernel), biases

    def widths(self) -> tuple[int, int]:
        return self.squeeze.in_channels, len(self.order.index)


def _margins(of: LayerShape) -> list[int]:
    """Return how far, in each dimension, the centre of the kernel reaches beyond the input; below 0: how far not."""
    each = zip(of.padding, of.dilation, of.kernel, strict=True)
    return [padding - dilation * (size // 2) for padding, dilation, size in each]


class Ghost(Block):
    """Some outputs as before; the others are small filters of these."""

    form: ClassVar[str] = "ghost"
    least: ClassVar[Mapping[str, int]] = {"ratio": 2}

    @classmethod
    def check(cls, of: LayerShape, numbers: Numbers) -> None:
        super().check(of, numbers)
        if numbers["ratio"] > of.outputs:
            raise ValueError(f"ratio must be at most its {of.outputs} outputs; got {numbers['ratio']}")

    @classmethod
    def ghosts(cls, of: LayerShape, numbers: Numbers) -> list[int]:
        """Return how many outputs each of the small convolutions makes."""
        computed = -(-of.outputs // numbers["ratio"])
        rest = of.outputs - computed
        return [min(computed, rest - first) for first in range(0, rest, computed)]

    @classmethod
    def parts(cls, of: LayerShape, numbers: Numbers) -> dict[str, nn.Module]:
        ghosts = cls.ghosts(of, numbers)
        parts: dict[str, nn.Module] = {"primary": _filters(of, of.inputs, of.outputs - sum(ghosts), bias=of.bias)}
        for t, count in enumerate(ghosts):
            conv = CONVS[len(of.kernel)]
            parts[_numbered("cheap", t)] = conv(
                count,
                count,
                GHOST_SIZE,
                padding=GHOST_SIZE // 2,
                groups=count,
                bias=of.bias,
                dtype=of.dtype,
                device=of.device,
            )
        return parts | {"order": Order(of.outputs, of.device)}

    @classmethod
    def cost(cls, of: LayerShape, numbers: Numbers) -> tuple[int, int]:
        rest = sum(cls.ghosts(of, numbers))
        taps = GHOST_SIZE ** len(of.kernel)
        return 0, math.prod(of.kernel) * of.inputs * (of.outputs - rest) + taps * rest

    def forward(self, x: Tensor) -> Tensor:
        primary, *cheap, order = self.children()
        computed = primary(x)
        made = [
            one(computed if one.in_channels == computed.shape[1] else computed[:, : one.in_channels]) for one in cheap
        ]
        ordered: Tensor = order(torch.cat([computed, *made], 1))
        return ordered

    def widths(self) -> tuple[int, int]:
        return self.primary.in_channels, len(self.order.index)


class Shuffle(Block):
    """A grouped 1x1 convolution, a shuffle of its channels, filters of each, and a grouped 1x1 convolution."""

    form: ClassVar[str] = "shuffle"
    least: ClassVar[Mapping[str, int]] = {"hidden": 1, "groups": 1}

    @classmethod
    def check(cls, of: LayerShape, numbers: Numbers) -> None:
        super().check(of, numbers)
        for what, count in (("inputs", of.inputs), ("outputs", of.outputs), ("hidden channels", numbers["hidden"])):
            if count % numbers["groups"]:
                raise ValueError(f"groups={numbers['groups']} does not divide its {count} {what}")

    @classmethod
    def parts(cls, of: LayerShape, numbers: Numbers) -> dict[str, nn.Module]:
        hidden, groups = numbers["hidden"], numbers["groups"]
        return {
            "first": _point(of, of.inputs, hidden, groups=groups),
            "depthwise": _filters(of, hidden, hidden, groups=hidden),
            "last": _point(of, hidden, of.outputs, groups=groups, bias=of.bias),
        }

    @classmethod
    def cost(cls, of: LayerShape, numbers: Numbers) -> tuple[int, int]:
        hidden, groups = numbers["hidden"], numbers["groups"]
        return of.inputs * hidden // groups, hidden * math.prod(of.kernel) + hidden * of.outputs // groups

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        dealt = torch.unflatten(hidden, 1, (self.first.groups, -1)).transpose(1, 2).flatten(1, 2)
        mixed: Tensor = self.last(self.depthwise(dealt))
        return mixed

    def dense_weight(self) -> tuple[Tensor, Tensor | None]:
        first = self.first.weight.flatten(1)
        dealt = torch.arange(len(first), device=first.device).view(self.first.groups, -1).T.flatten()
        weight = shuffle_weight(first[dealt], self.depthwise.weight.flatten(1), self.last.weight.flatten(1))
        return torch.unflatten(weight, 2, self.of.kernel), self.last.bias


FORMS: Mapping[str, type[Block]] = {one.form: one for one in (Separable, Xception, Fire, Ghost, Shuffle)}


def numbers_for(
    of: LayerShape, block: str, *, multiplier: int = 1, squeeze: float = 0.125, ratio: int = 2, groups: int = 2
) -> dict[str, int]:
    """Return the numbers with which a layer becomes a block.

    Args:
        of: The layer.
        block: The name of the form.
        multiplier: Of separable and xception: how many terms.
        squeeze: Of fire: the squeezed channels, as a share of the outputs.
        ratio: Of ghost: the share of the outputs that is computed is 1 / ratio.
        groups: Of shuffle: of its 1x1 convolutions; it has as many hidden channels as the layer has outputs.
    """
    if block in ("separable", "xception"):
        return {"terms": multiplier}
    if block == "fire":
        return {"squeeze": min(of.inputs, max(1, round(squeeze * of.outputs)))}
    if block == "ghost":
        return {"ratio": ratio}
    return {"hidden": of.outputs, "groups": groups}
