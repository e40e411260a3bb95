"""The small networks that recipes, benchmarks and the demo compress."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "hardtanh": nn.Hardtanh}


class DigitsConvNet(nn.Sequential):
    """A network of four blocks of convolution, batch norm and ReLU, and one linear layer, made for 8x8 images.

    The first two blocks have `width` channels, the last two twice as many. A 2x2 max-pooling follows each pair of
    blocks. With width 24 the network has 38,722 parameters.

    Args:
        num_classes: The number of outputs.
        in_channels: The number of channels of the image.
        width: The number of channels of the first two blocks.
        image_size: The height and width of the square image, a multiple of 4.
        activation: "relu"; or "hardtanh", for layers with binary inputs.

    Shapes:
        input (N, in_channels, image_size, image_size), output (N, num_classes).

    Example:
        >>> import torch
        >>> DigitsConvNet()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        width: int = 24,
        image_size: int = 8,
        activation: Literal["relu", "hardtanh"] = "relu",
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {activation!r}.")
        if image_size % 4 or image_size < 4:
            raise ValueError(
                f"image_size of DigitsConvNet must be a multiple of 4, because it halves the image twice; got"
                f" {image_size}."
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = [in_channels, width, width, 2 * width, 2 * width]
        for i, (inputs, outputs) in enumerate(pairwise(channels), start=1):
            layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers[f"bn{i}"] = nn.BatchNorm2d(outputs)
            layers[f"{activation}{i}"] = _ACTIVATIONS[activation]()
            if i % 2 == 0:
                layers[f"pool{i // 2}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(2 * width * (image_size // 4) ** 2, num_classes)
        super().__init__(layers)


class LeNet300(nn.Sequential):
    """LeNet-300-100: Linear, ReLU, Linear, ReLU, Linear, after flattening the input.

    This is the fully connected network of LeCun et al. 1998 (Gradient-based learning applied to document recognition)
    with the sizes of pruning papers (Han et al. 2015, table 1): 266,200 weights and 410 biases.

    Args:
        in_features: The size of one flattened input.
        num_classes: The number of outputs.

    Shapes:
        input (N, ...) with `in_features` elements per sample, output (N, num_classes).

    Example:
        >>> import torch
        >>> LeNet300()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(self, *, in_features: int = 784, num_classes: int = 10) -> None:
        super().__init__(
            OrderedDict(
                flatten=nn.Flatten(),
                fc1=nn.Linear(in_features, 300),
                relu1=nn.ReLU(),
                fc2=nn.Linear(300, 100),
                relu2=nn.ReLU(),
                fc3=nn.Linear(100, num_classes),
            )
        )


class LeNet5(nn.Sequential):
    """LeNet-5 of Caffe and Deep Compression: 20 and 50 filters of 5x5, then 500 hidden units, for 28x28 images.

    The layers are conv1, max-pooling, conv2, max-pooling, fc1, ReLU and fc2, with 430,500 weights and 580 biases (Han
    et al. 2015, table 1). Caffe's network has one ReLU, after fc1. Here a ReLU follows each convolution as well, as in
    most later work, so that the zeros of every channel's activation can be counted; `conv_relu=False` makes Caffe's
    network.

    Args:
        in_channels: The number of channels of the image.
        num_classes: The number of outputs.
        conv_relu: Whether a ReLU follows each convolution.

    Shapes:
        input (N, in_channels, 28, 28), output (N, num_classes).

    Example:
        >>> import torch
        >>> LeNet5()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(self, *, in_channels: int = 1, num_classes: int = 10, conv_relu: bool = True) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (inputs, outputs) in enumerate([(in_channels, 20), (20, 50)], start=1):
            layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 5)
            if conv_relu:
                layers[f"relu{i}"] = nn.ReLU()
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        layers["fc1"] = nn.Linear(50 * 4 * 4, 500)
        layers["relu3"] = nn.ReLU()
        layers["fc2"] = nn.Linear(500, num_classes)
        super().__init__(layers)


class MLP(nn.Sequential):
    """A multilayer perceptron with ReLU and optional dropout, after flattening the input.

    The layers are flatten, fc1, relu1, dropout1, fc2, and so on; neither ReLU nor dropout follow the last linear layer.
    Widths 784, 1200, 1200, 10 with dropout 0.5 and input dropout 0.2 are the teacher of Hinton et al. 2015 (arXiv
    1503.02531, section 3), with 2,395,210 parameters.

    Args:
        widths: The sizes of the flattened input, of each hidden layer, and of the output.
        dropout: The probability of dropping an output of a hidden layer; with 0 there are no such dropout layers.
        input_dropout: The probability of dropping an input; with 0 there is no such dropout layer.

    Raises:
        ValueError: `widths` has fewer than two numbers.

    Shapes:
        input (N, ...) with `widths[0]` elements per sample, output (N, `widths[-1]`).

    Example:
        >>> import torch
        >>> MLP(widths=(784, 800, 800, 10))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self, *, widths: Sequence[int] = (784, 1200, 1200, 10), dropout: float = 0.0, input_dropout: float = 0.0
    ) -> None:
        if len(widths) < 2:
            raise ValueError(
                f"widths of MLP must have at least two numbers, the sizes of its input and its output; got {widths!r}."
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        if input_dropout:
            layers["dropout0"] = nn.Dropout(input_dropout)
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            layers[f"fc{i}"] = nn.Linear(inputs, outputs)
            if i == len(widths) - 1:
                break
            layers[f"relu{i}"] = nn.ReLU()
            if dropout:
                layers[f"dropout{i}"] = nn.Dropout(dropout)
        super().__init__(layers)


class ResidualBlock(nn.Module):
    """A residual block relu(f(x) + shortcut(x)), where f has two 3x3 convolutions with batch norms.

    Args:
        in_channels: The number of channels of the input.
        out_channels: The number of channels of the output.
        stride: The stride of the first convolution and of the shortcut.

    Shapes:
        input (N, in_channels, H, W), output (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Example:
        >>> import torch
        >>> ResidualBlock(16, 32, stride=2)(torch.zeros(5, 16, 8, 8)).shape
        torch.Size([5, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))
        self.relu2 = nn.ReLU()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        hidden = self.relu1(self.bn1(self.conv1(x_NCHW)))
        output: Tensor = self.relu2(self.bn2(self.conv2(hidden)) + self.shortcut(x_NCHW))
        return output


class ResNet20(nn.Module):
    """The CIFAR ResNet of He et al. 2015, section 4.2: a 3x3 stem and three stages of three residual blocks.

    The stages have `width`, 2 `width` and 4 `width` channels, and the image is halved between them. The two shortcuts
    that change the shape are 1x1 convolutions with batch norm (the paper's option B), so that the channels of a stage
    can be cut like any others. The paper's CIFAR networks pad with zero channels instead (option A). With width 16,
    three input channels and ten classes there are 272,474 parameters (option A: 269,722).

    Args:
        width: The number of channels of the first stage.
        in_channels: The number of channels of the image.
        num_classes: The number of outputs.

    Shapes:
        input (N, in_channels, H, W) of any size, output (N, num_classes).

    Example:
        >>> import torch
        >>> ResNet20(width=4, in_channels=1)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(self, *, width: int = 16, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stages = nn.Sequential(
            _stage(width, width, stride=1),
            _stage(width, 2 * width, stride=2),
            _stage(2 * width, 4 * width, stride=2),
        )
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        hidden = self.stages(self.relu(self.bn(self.conv(x_NCHW))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(hidden, 1).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(in_channels, out_channels, stride=stride),
        ResidualBlock(out_channels, out_channels),
        ResidualBlock(out_channels, out_channels),
    )
