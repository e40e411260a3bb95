"""MSDNet (Huang et al. 2018, arXiv 1703.09844): layers have feature maps of several scales; exits read the coarsest."""

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
    """The head of an exit: two 3x3 conv-bn-relu of stride 2, an average pooling of 2x2, and one linear layer.

    There is no pooling if the convolutions leave a single pixel, as of 8x8 images.

    Args:
        in_channels: The number of channels of the coarsest feature map.
        size: The height and width of that square feature map.
        num_classes: The number of outputs.
        width: The number of channels of the two convolutions; 128 in the paper.

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
    """Return an `MSDNetClassifier` for feature maps of the shape (N, C, H, H) of `feature`.

    Args:
        feature: An output of the layer at the exit; only its shape is used.
        num_classes: The number of outputs.
        width: The number of channels of the head's convolutions.

    Raises:
        ValueError: `feature` is not a square feature map.

    Example:
        >>> msdnet_classifier(torch.zeros(2, 64, 7, 7), 10)(torch.zeros(2, 64, 7, 7)).shape
        torch.Size([2, 10])
    """
    if feature.dim() != 4 or feature.shape[2] != feature.shape[3]:
        raise ValueError(
            f"msdnet_classifier needs a feature map of shape (N, C, H, H); got {tuple(feature.shape)}. Name a layer"
            " that returns one."
        )
    return MSDNetClassifier(feature.shape[1], size=feature.shape[2], num_classes=num_classes, width=width)


class _Bottleneck(nn.Sequential):
    """A 1x1 and a 3x3 convolution, each with batch norm and ReLU.

    Args:
        in_channels: The number of channels of the input.
        out_channels: The number of channels of the output.
        factor: The 1x1 convolution has min(in_channels, factor * out_channels) outputs.
        stride: The stride of the 3x3 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, factor: int, stride: int = 1) -> None:
        inner = min(in_channels, factor * out_channels)
        super().__init__(*_conv_bn_relu(in_channels, inner, 1), *_conv_bn_relu(inner, out_channels, 3, stride=stride))


class MSDNetUnit(nn.Module):
    """One scale of one layer: concatenates the scale's features with new ones from this scale and from the finer scale.

    In the finest remaining scale all new features are computed from this scale. In every other scale half of them are
    computed from this scale, and half from the finer scale by a convolution of stride 2.

    Args:
        in_channels: The number of channels of the scale before this layer.
        finer_channels: The number of channels of the next finer scale; 0 for the finest scale.
        growth: The number of new features.
        factor: The width of the 1x1 convolution, in multiples of the outputs of its 3x3 convolution.
        finer_factor: The width of the 1x1 convolution that reads the finer scale, likewise.

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
    """The units of one layer by the name of their scale, finest first; maps a list of feature maps to such a list."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        dropped = len(features) - len(self)
        finer = [None, *features]
        return [unit(features[i], finer[i]) for i, unit in enumerate(self.values(), start=dropped)]


class _Transition(nn.ModuleDict):
    """A 1x1 convolution per scale, by the name of the scale; maps a list of feature maps to such a list."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [layer(feature) for layer, feature in zip(self.values(), features, strict=True)]


class _Stem(nn.ModuleDict):
    """The first layer: a 3x3 convolution of the image, and a convolution of stride 2 from each scale to the next."""

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        features = []
        for layer in self.values():
            x_NCHW = layer(x_NCHW)
            features.append(x_NCHW)
        return features


class MSDNet(nn.Module):
    """The Multi-Scale DenseNet for small images; each of its blocks ends with a feature map that a classifier can read.

    A layer has one feature map per scale s. Each scale has half the height and width of the scale before it, and
    `factors[s]` times as many channels as a scale of factor 1. Each layer concatenates `growth` times `factors[s]` new
    features (`MSDNetUnit`). With L layers and S scales, the finest remaining scale is dropped every ceil(L / S) layers
    (the paper's "max" reduction), and a transition, a 1x1 convolution with batch norm and ReLU, keeps the fraction
    `reduction` of the other scales' channels. Features that no classifier reads are not computed: layer L - j has at
    most the j + 1 coarsest scales.

    The network returns the logits of its last classifier, so it trains like any other network. For the other blocks
    `exits` names the modules that return the coarsest feature map of the block as one tensor. With heads made by
    `msdnet_classifier` at these exits, and the unweighted sum of all losses, it is the network of the paper. The
    defaults make its network for anytime prediction on CIFAR; `blocks=5, base=1, step=1, step_mode="lin_grow"` makes
    its network for budgeted batch classification.

    Args:
        blocks: The number of classifiers, the last one included.
        base: The number of layers of the first block.
        step: The number of layers of each other block; with "lin_grow", block b (counted from 0) has `step` b + 1.
        step_mode: "even" or "lin_grow".
        channels: The number of channels of the first layer at the finest scale.
        growth: The number of new features of a layer at the finest scale.
        factors: The factors of channels and growth, one per scale, finest first.
        bottleneck: The widths of the 1x1 convolutions, in multiples of the 3x3 convolution's outputs, one per scale.
        reduction: The fraction of the channels that a transition keeps.
        head_width: The number of channels of the classifier's convolutions.
        in_channels: The number of channels of the image.
        image_size: The height and width of the square image.
        num_classes: The number of outputs.

    Raises:
        ValueError: `step_mode` is unknown, `factors` and `bottleneck` differ in length, a block has no layers, or the
            image is too small for the scales.

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
                "factors and bottleneck of MSDNet need one number per scale, so they must be equally long;"
                f" got {list(factors)} and {list(bottleneck)}."
            )
        sizes = [base] + [step * b + 1 if step_mode == "lin_grow" else step for b in range(1, blocks)]
        if blocks < 1 or min(sizes) < 1:
            raise ValueError(
                f"MSDNet needs at least one block, and each block at least one layer; got blocks={blocks} with {sizes}"
                " layers. Change blocks, base or step."
            )
        scales, total = len(factors), sum(sizes)
        size = image_size
        for _ in range(scales - 1):
            size = math.ceil(size / 2)
        if size < 2:
            raise ValueError(
                f"The {scales} scales of MSDNet leave {size} pixel of images of {image_size}x{image_size}, and at least"
                " 2 are needed: give fewer factors."
            )

        self.stem = _Stem()
        for s in range(scales):
            inputs = in_channels if s == 0 else channels * factors[s - 1]
            layer = _conv_bn_relu(inputs, channels * factors[s], 3, stride=1 if s == 0 else 2)
            self.stem[f"scale{s}"] = nn.Sequential(*layer)

        interval = math.ceil(total / scales)
        width, number, finest = channels, 0, 0  # channels per factor, layers so far, finest scale
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
        """The names of the modules that return the coarsest feature map of each block except the last, in order."""
        coarsest = list(self.stem)[-1]
        ends = [len(block) - 1 for block in self.blocks]  # type: ignore[arg-type]  # Sequentials
        return tuple(f"blocks.{b}.{end}.{coarsest}" for b, end in enumerate(ends[:-1]))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(x_NCHW))[-1])
        return logits
