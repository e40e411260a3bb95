"""Small networks of blocks that are cheaper than a convolution, for images of 8 to 32 pixels: five families, one shape.

Each has a 3x3 stem of `width` channels and stages of `width`, 2 `width` and 4 `width` channels; the image is halved
between them, and the mean over the rest of it is classified. The blocks are those of the papers, with a batch norm
after each convolution; the papers' networks are for images of 224 pixels, and deeper.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.core.given import whole_number


def _norm_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU()]


def _point(in_channels: int, out_channels: int, *, groups: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, groups=groups, bias=False)


def _depthwise(channels: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class Shuffle(nn.Module):
    """Deals the channels of each group out to all groups: channel j of group i becomes channel i of group j."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return torch.unflatten(x_NCHW, 1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class SeparableBlock(nn.Sequential):
    """MobileNet's block: a depthwise 3x3 convolution, then a 1x1 convolution, each with a batch norm and a ReLU.

    Shapes:
        input (N, in_channels, H, W), output (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__(
            _depthwise(in_channels, stride=stride),
            *_norm_relu(in_channels),
            _point(in_channels, out_channels),
            *_norm_relu(out_channels),
        )


class FireBlock(nn.Module):
    """SqueezeNet's fire module: a 1x1 convolution squeezes; 1x1 and 3x3 ones expand, half of the outputs each.

    Args:
        in_channels: The number of channels of the input.
        out_channels: The number of channels of the output.
        stride: Of a max-pooling before it, as in the paper.
        squeeze: The squeezed channels, as a share of the outputs; 0.125 in the paper.

    Shapes:
        input (N, in_channels, H, W), output (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, squeeze: float = 0.125) -> None:
        super().__init__()
        width, half = max(1, round(squeeze * out_channels)), out_channels // 2
        self.pool = nn.MaxPool2d(3, stride=stride, padding=1) if stride > 1 else nn.Identity()
        self.squeeze = nn.Sequential(_point(in_channels, width), *_norm_relu(width))
        self.expand1 = nn.Sequential(_point(width, half), *_norm_relu(half))
        rest = out_channels - half
        self.expand3 = nn.Sequential(nn.Conv2d(width, rest, 3, padding=1, bias=False), *_norm_relu(rest))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        squeezed = self.squeeze(self.pool(x_NCHW))
        return torch.cat([self.expand1(squeezed), self.expand3(squeezed)], 1)


class ShuffleBlock(nn.Module):
    """ShuffleNet's unit: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1, around a shortcut.

    With a stride the shortcut is a mean over 3x3 pixels, and what the unit adds is put beside it. A ReLU follows the
    first convolution and the sum, and none the depthwise one.

    Args:
        in_channels: The number of channels of the input.
        out_channels: The number of channels of the output: that of the input with stride 1, and more with another.
        stride: Of the depthwise convolution.
        groups: Of the 1x1 convolutions.

    Shapes:
        input (N, in_channels, H, W), output (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 2) -> None:
        super().__init__()
        if out_channels != in_channels if stride == 1 else out_channels <= in_channels:
            raise ValueError(
                f"A ShuffleBlock keeps its channels with stride 1, and adds some with another; got {in_channels} and "
                f"{out_channels} with stride {stride}."
            )
        added, hidden = out_channels - (in_channels if stride > 1 else 0), out_channels // 4
        self.branch = nn.Sequential(
            _point(in_channels, hidden, groups=groups),
            *_norm_relu(hidden),
            Shuffle(groups),
            _depthwise(hidden, stride=stride),
            nn.BatchNorm2d(hidden),
            _point(hidden, added, groups=groups),
            nn.BatchNorm2d(added),
        )
        self.shortcut = nn.AvgPool2d(3, stride=stride, padding=1) if stride > 1 else nn.Identity()
        self.relu, self.beside = nn.ReLU(), stride > 1

    def forward(self, x_NCHW: Tensor) -> Tensor:
        branch, shortcut = self.branch(x_NCHW), self.shortcut(x_NCHW)
        output: Tensor = self.relu(torch.cat([shortcut, branch], 1) if self.beside else shortcut + branch)
        return output


class XceptionBlock(nn.Module):
    """Xception's residual block: two times a 1x1 and a depthwise 3x3 convolution, with nothing between the two.

    Shapes:
        input (N, in_channels, H, W), output (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(),
            _point(in_channels, out_channels),
            _depthwise(out_channels),
            *_norm_relu(out_channels),
            _point(out_channels, out_channels),
            _depthwise(out_channels, stride=stride),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(_point(in_channels, out_channels, stride=stride))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        output: Tensor = self.branch(x_NCHW) + self.shortcut(x_NCHW)
        return output


class GhostModule(nn.Module):
    """GhostNet's module: half of the outputs by a 1x1 convolution, the others by a depthwise 3x3 one of these.

    Args:
        in_channels: The number of channels of the input.
        out_channels: The number of channels of the output, an even number.
        relu: Whether a ReLU follows.

    Shapes:
        input (N, in_channels, H, W), output (N, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, *, relu: bool = True) -> None:
        super().__init__()
        half, odd = divmod(out_channels, 2)
        if odd or not half:
            raise ValueError(f"out_channels of a GhostModule must be an even number, 2 or more; got {out_channels!r}.")
        end = nn.ReLU if relu else nn.Identity
        self.primary = nn.Sequential(_point(in_channels, half), nn.BatchNorm2d(half), end())
        self.cheap = nn.Sequential(_depthwise(half), nn.BatchNorm2d(half), end())

    def forward(self, x_NCHW: Tensor) -> Tensor:
        computed = self.primary(x_NCHW)
        return torch.cat([computed, self.cheap(computed)], 1)


class GhostBlock(nn.Module):
    """GhostNet's bottleneck: two ghost modules around a shortcut, with a depthwise 3x3 between them if it has a stride.

    Squeeze-and-excitation, which some of the paper's blocks have, is left out.

    Args:
        in_channels: The number of channels of the input.
        out_channels: The number of channels of the output.
        stride: Of the depthwise convolutions.
        expansion: The hidden channels, as a multiple of the outputs.

    Shapes:
        input (N, in_channels, H, W), output (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, expansion: int = 2) -> None:
        super().__init__()
        hidden = expansion * out_channels
        self.branch = nn.Sequential(GhostModule(in_channels, hidden))
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.branch.extend([_depthwise(hidden, stride=stride), nn.BatchNorm2d(hidden)])
        self.branch.append(GhostModule(hidden, out_channels, relu=False))
        if stride != 1 or in_channels != out_channels:
            self.shortcut.extend([_depthwise(in_channels, stride=stride), nn.BatchNorm2d(in_channels)])
            self.shortcut.extend([_point(in_channels, out_channels), nn.BatchNorm2d(out_channels)])

    def forward(self, x_NCHW: Tensor) -> Tensor:
        output: Tensor = self.branch(x_NCHW) + self.shortcut(x_NCHW)
        return output


class Efficient(nn.Sequential):
    """A stem, three stages of blocks, and a classifier of the mean over the image; its subclasses say which blocks.

    Args:
        width: The number of channels of the first stage, a multiple of 8.
        in_channels: The number of channels of the image.
        num_classes: The number of outputs.
        depth: The number of blocks of each stage.

    Shapes:
        input (N, in_channels, H, W) of any size, output (N, num_classes).

    Example:
        >>> [kind(width=8, in_channels=1)(torch.zeros(5, 1, 8, 8)).shape[1] for kind in Efficient.__subclasses__()]
        [10, 10, 10, 10, 10]
    """

    block: ClassVar[type[nn.Module]]

    def __init__(self, *, width: int = 32, in_channels: int = 3, num_classes: int = 10, depth: int = 2) -> None:
        name = type(self).__name__
        if whole_number(width, f"width of {name} must be a multiple of 8", least=8) % 8:
            raise ValueError(f"width of {name} must be a multiple of 8; got {width!r}.")
        whole_number(depth, f"depth of {name} is the blocks of each stage, 1 or more", least=1)
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), *_norm_relu(width)]
        channels = width
        for stage in range(3):
            for first in [True] + [False] * (depth - 1):
                layers.append(self.block(channels, width * 2**stage, stride=2 if first and stage > 0 else 1))
                channels = width * 2**stage
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class MobileNet(Efficient):
    """A small MobileNet of separable blocks (Howard et al. 2017, 1704.04861); see `Efficient` for the arguments."""

    block = SeparableBlock


class SqueezeNet(Efficient):
    """A small SqueezeNet of fire modules (Iandola et al. 2016, 1602.07360), here with batch norms; see `Efficient`."""

    block = FireBlock


class ShuffleNet(Efficient):
    """A small ShuffleNet of units with two groups (Zhang et al. 2017, 1707.01083); see `Efficient`."""

    block = ShuffleBlock


class Xception(Efficient):
    """A small Xception of residual blocks (Chollet 2016, 1610.02357); see `Efficient`."""

    block = XceptionBlock


class GhostNet(Efficient):
    """A small GhostNet of ghost bottlenecks (Han et al. 2019, 1911.11907); see `Efficient`."""

    block = GhostBlock
