from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.baselines import GhostNet, MobileNet, ShuffleNet, SqueezeNet, Xception
from lightning_compress.baselines.efficient import (
    Efficient,
    FireBlock,
    GhostBlock,
    GhostModule,
    SeparableBlock,
    Shuffle,
    ShuffleBlock,
    XceptionBlock,
)
from lightning_compress.channels import channel_groups

KINDS = [MobileNet, SqueezeNet, ShuffleNet, Xception, GhostNet]


def weights(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters() if one.dim() == 4)


def test_blocks_have_the_published_numbers_of_weights() -> None:
    # MobileNet, table 1: the second block, 64 -> 128 with stride 2: 3 * 3 * 64 and 64 * 128
    assert weights(SeparableBlock(64, 128, stride=2)) == 576 + 8_192
    # SqueezeNet, table 1: fire2 has 11,920 parameters, of which 16 + 64 + 64 are biases
    assert weights(FireBlock(96, 128)) == 11_920 - 144
    # ShuffleNet, section 3.2: c m / g + 9 m + m c / g multiplications at each place, m = c / 4
    assert weights(ShuffleBlock(240, 240, groups=2)) == 240 * 60 // 2 + 9 * 60 + 60 * 240 // 2
    # GhostNet, equation 4 with s = 2, d = 3: half of the 1x1 convolution and 9 for each of the other half
    assert weights(GhostModule(40, 120)) == 40 * 60 + 9 * 60
    assert weights(XceptionBlock(728, 728)) == 2 * (728 * 728 + 9 * 728)


def test_shuffle_gives_each_group_channels_of_all_groups() -> None:
    dealt = Shuffle(3)(torch.arange(12.0).view(1, 12, 1, 1)).flatten().tolist()
    assert dealt == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_networks_train_on_digits_mnist_and_cifar_sizes(kind: type[Efficient], channels: int, size: int) -> None:
    network = kind(width=8, in_channels=channels)
    logits = network(torch.randn(4, channels, size, size))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(one.grad is not None for one in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_every_network_can_be_cut(kind: type[Efficient]) -> None:
    groups = channel_groups(kind(width=8, in_channels=1).eval(), torch.randn(2, 1, 8, 8))
    assert sum(one.frozen is None for one in groups) >= 2


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="width of GhostNet must be a multiple of 8; got 12"):
        GhostNet(width=12)
    with pytest.raises(ValueError, match=r"depth of MobileNet .* got 0"):
        MobileNet(depth=0)
    with pytest.raises(ValueError, match=r"width of GhostNet .* got 8\.0"):
        GhostNet(width=8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="GhostModule must be an even number, 2 or more; got 7"):
        GhostBlock(4, 7)
    with pytest.raises(ValueError, match="16 and 8 with stride 2"):
        ShuffleBlock(16, 8, stride=2)
    with pytest.raises(ValueError, match="16 and 32 with stride 1"):
        ShuffleBlock(16, 32)
    assert GhostBlock(8, 8)(torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)
