"""MSDNet (Huang et al. 2018, 1703.09844): layers have feature maps of several scales, and exits see the coarsest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

StepMode = Literal["even", "lin_grow"]


def _conv_bn_relu(in_channels: int, out_channels: int, size: int, *, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


class MSDNetClassifier(nn.Sequential):
    """The head of an exit: two 3x3 conv-bn-relu of stride 2, an average pooling of 2x2, and one Linear.

    Where the two convolutions leave a single pixel, as on images of 8x8, there is nothing to pool and no pooling.

    Args:
        in_channels: Channels of the coarsest feature map.
        size: Height and width of that (square) map.
        num_classes: Number of outputs.
        width: Channels of the two convolutions; the paper's is 128.

    Shapes:
        input (N, in_channels, size, size), output (N, num_classes).

    Example:
        >>> MSDNetClassifier(64, size=8)(torch.zeros(5, 64, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, in_channels: int, *, size: int, num_classes: int = 10, width: int = 128) -> None:
        layers = _conv_bn_relu(in_channels, width, 3, stride=2) + _conv_bn_relu(width, width, 3, stride=2)
        left = math.ceil(math.ceil(size / 2) / 2)
        if left > 1:
            layers.append(nn.AvgPool2d(2))
            left //= 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(width * left**2, num_classes))


def msdnet_classifier(feature: Tensor, num_classes: int, *, width: int = 128) -> MSDNetClassifier:
    """Return the `MSDNetClassifier` that reads feature maps like `feature`, of shape (N, C, H, H).

    Args:
        feature: What the layer at the exit returns; only its shape is looked at.
        num_classes: Number of outputs.
        width: Channels of the head's convolutions.

    Raises:
        ValueError: `feature` is no square feature map.

    Example:
        >>> msdnet_classifier(torch.zeros(2, 64, 7, 7), 10)(torch.zeros(2, 64, 7, 7)).shape
        torch.Size([2, 10])
    """
    if feature.dim() != 4 or feature.shape[2] != feature.shape[3]:
        raise ValueError(f"MSDNet's classifier reads feature maps of shape (N, C, H, H); got {tuple(feature.shape)}.")
    return MSDNetClassifier(feature.shape[1], size=feature.shape[2], num_classes=num_classes, width=width)


class _Bottleneck(nn.Sequential):
    """Conv 1x1, bn, relu, conv 3x3, bn, relu; the 1x1 one has `factor` times the outputs, or as many as come in."""

    def __init__(self, in_channels: int, out_channels: int, *, factor: int, stride: int = 1) -> None:
        inner = min(in_channels, factor * out_channels)
        super().__init__(*_conv_bn_relu(in_channels, inner, 1), *_conv_bn_relu(inner, out_channels, 3, stride=stride))


class MSDNetUnit(nn.Module):
    """One scale of one layer: concatenates what the scale has with new features from it and from the finer scale.

    The finest scale that is left gets all new features from itself; every other one gets half from the finer scale,
    through a convolution of stride 2, and half from itself.

    Args:
        in_channels: Channels that the scale has so far.
        finer_channels: Channels of the next finer scale; 0 for the finest scale.
        growth: New features.
        factor: Width of the 1x1 convolution in multiples of its 3x3 convolution's outputs.
        finer_factor: The same for the convolutions that read the finer scale.

    Shapes:
        own (N, in_channels, H, W), finer (N, finer_channels, 2 H, 2 W), output (N, in_channels + growth, H, W).
    """

    def __init__(
        self, in_channels: int, *, finer_channels: int = 0, growth: int, factor: int, finer_factor: int = 1
    ) -> None:
        super().__init__()
        half = growth // 2 if finer_channels else 0
        if half:
            self.down = _Bottleneck(finer_channels, half, factor=finer_factor, stride=2)
        self.same = _Bottleneck(in_channels, growth - half, factor=factor)

    def forward(self, own: Tensor, finer: Tensor | None = None) -> Tensor:
        new = [] if finer is None else [self.down(finer)]
        return torch.cat([own, *new, self.same(own)], dim=1)


class _Layer(nn.ModuleDict):
    """The units of one layer by the name of their scale, finest first; reads and returns a list of feature maps."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        dropped = len(features) - len(self)
        finer = [None, *features]
        return [unit(features[i], finer[i]) for i, unit in enumerate(self.values(), start=dropped)]


class _Transition(nn.ModuleDict):
    """A 1x1 convolution per scale, by the name of the scale; reads and returns a list of feature maps."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [layer(feature) for layer, feature in zip(self.values(), features, strict=True)]


class _Stem(nn.ModuleDict):
    """The first layer: a 3x3 convolution of the image, and from each scale one of stride 2 to the next."""

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        features = []
        for layer in self.values():
            x_NCHW = layer(x_NCHW)
            features.append(x_NCHW)
        return features


class MSDNet(nn.Module):
    """The Multi-Scale DenseNet for small images, whose every block ends in a feature map that a classifier can read.

    Layer l keeps a feature map per scale; each scale is half as high and wide as the one before and has
    `factors[s]` times its channels. Every layer concatenates `growth` times `factors[s]` new features (`MSDNetUnit`).
    With L layers and S scales the finest remaining scale is dropped every ceil(L / S) layers (the paper's "max"
    reduction), and a transition, a 1x1 conv-bn-relu, leaves the share `reduction` of the others' channels. What no
    classifier reads is not computed: layer L - j has the j + 1 coarsest scales at most.

    The network returns the logits of its last classifier, so that it trains like any other; `exits` names, for the
    blocks before, the modules that return the block's coarsest feature map as one tensor: heads by
    `msdnet_classifier` there and the plain sum of all losses are the paper's network. The defaults are its network for
    anytime prediction on CIFAR; `blocks=5, base=1, step=1, step_mode="lin_grow"` is that for a budget per batch.

    Args:
        blocks: Number of classifiers, the last one's included.
        base: Layers of the first block.
        step: Layers of each other block; with "lin_grow", block b (from 0) has `step` b + 1.
        step_mode: "even" or "lin_grow".
        channels: Of the first layer at the finest scale.
        growth: New features of a layer at the finest scale.
        factors: Of channels and growth, one per scale, finest first.
        bottleneck: Width of the 1x1 convolutions in multiples of the 3x3 convolution's outputs, one per scale.
        reduction: Share of the channels that a transition leaves.
        head_width: Channels in the classifier's convolutions.
        in_channels: Channels of the image.
        image_size: Height and width of the (square) image.
        num_classes: Number of outputs.

    Raises:
        ValueError: Unknown `step_mode`, as many `bottleneck` as `factors` are needed, no layers, or an image too small
            for the scales.

    Shapes:
        input (N, in_channels, image_size, image_size), output (N, num_classes).

    Example:
        >>> network = MSDNet(blocks=3, base=1, step=1, in_channels=1, image_size=28)
        >>> network(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
        >>> network.exits
        ('blocks.0.0.scale2', 'blocks.1.1.scale2')
    """

    def __init__(
        self,
        *,
        blocks: int = 7,
        base: int = 4,
        step: int = 2,
        step_mode: StepMode = "even",
        channels: int = 16,
        growth: int = 6,
        factors: Sequence[int] = (1, 2, 4),
        bottleneck: Sequence[int] = (1, 2, 4),
        reduction: float = 0.5,
        head_width: int = 128,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if step_mode not in get_args(StepMode):
            raise ValueError(f"step_mode must be one of {', '.join(get_args(StepMode))}; got {step_mode!r}.")
        if len(factors) != len(bottleneck) or not factors:
            raise ValueError(
                "factors and bottleneck have one number per scale, so they are equally long;"
                f" got {list(factors)} and {list(bottleneck)}."
            )
        sizes = [base] + [step * b + 1 if step_mode == "lin_grow" else step for b in range(1, blocks)]
        if blocks < 1 or min(sizes) < 1:
            raise ValueError(f"Each block has one layer or more; blocks={blocks} of {sizes} layers were asked for.")
        scales, total = len(factors), sum(sizes)
        size = image_size
        for _ in range(scales - 1):
            size = math.ceil(size / 2)
        if size < 2:
            raise ValueError(
                f"{scales} scales leave {size} pixel of images of {image_size}x{image_size}: give fewer factors."
            )

        self.stem = _Stem()
        for s in range(scales):
            inputs = in_channels if s == 0 else channels * factors[s - 1]
            layer = _conv_bn_relu(inputs, channels * factors[s], 3, stride=1 if s == 0 else 2)
            self.stem[f"scale{s}"] = nn.Sequential(*layer)

        interval = math.ceil(total / scales)
        width, number, finest = channels, 0, 0  # channels in multiples of a scale's factor, layers, scale
        self.blocks = nn.Sequential()
        for layers in sizes:
            block = nn.Sequential()
            for _ in range(layers):
                number += 1
                given, finest = finest, max((number - 1) // interval, scales - 1 - (total - number))
                units = {
                    f"scale{s}": MSDNetUnit(
                        width * factors[s],
                        finer_channels=width * factors[s - 1] if s > given else 0,
                        growth=growth * factors[s],
                        factor=bottleneck[s],
                        finer_factor=bottleneck[s - 1],
                    )
                    for s in range(finest, scales)
                }
                block.append(_Layer(units))
                width += growth
                if number > 1 and (number - 1) % interval == 0:
                    before, width = width, math.floor(reduction * width)
                    smaller = {
                        f"scale{s}": nn.Sequential(*_conv_bn_relu(before * factors[s], width * factors[s], 1))
                        for s in range(finest, scales)
                    }
                    block.append(_Transition(smaller))
            self.blocks.append(block)
        self.classifier = MSDNetClassifier(width * factors[-1], size=size, num_classes=num_classes, width=head_width)

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the modules that return the coarsest feature map of each block but the last, in order."""
        coarsest = list(self.stem)[-1]
        ends = [len(block) - 1 for block in self.blocks]  # type: ignore[arg-type]  # Sequentials
        return tuple(f"blocks.{b}.{end}.{coarsest}" for b, end in enumerate(ends[:-1]))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(x_NCHW))[-1])
        return logits
