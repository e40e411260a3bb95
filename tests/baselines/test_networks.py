from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.baselines import MLP, DigitsConvNet, LeNet5, LeNet300, ResNet20


def weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_lenets_have_the_published_number_of_weights() -> None:
    # Han et al. 2015, table 1: 267K and 431K; per layer 235K, 30K, 1K and 0.5K, 25K, 400K, 5K
    assert [p.numel() for p in LeNet300().parameters() if p.dim() > 1] == [235_200, 30_000, 1_000]
    assert [p.numel() for p in LeNet5().parameters() if p.dim() > 1] == [500, 25_000, 400_000, 5_000]


def test_resnet20_has_the_published_size_plus_its_two_projections() -> None:
    # 269,722 with parameter-free shortcuts (0.27M in He et al. 2015, table 6); option B adds conv and norm twice
    assert parameters(ResNet20()) == 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    main_path = [m for n, m in ResNet20().named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
    assert len(main_path) + 1 == 20


def test_resnet20_width_scales_every_layer() -> None:
    assert weights(ResNet20(width=8)) < weights(ResNet20(width=16)) / 3.5


def test_digits_net_is_between_30_and_60_thousand_parameters() -> None:
    assert parameters(DigitsConvNet()) == 38_722


def test_digits_net_refuses_images_that_cannot_be_halved_twice_and_unknown_activations() -> None:
    with pytest.raises(ValueError, match=r"multiple of 4, .* got 10"):
        DigitsConvNet(image_size=10)
    with pytest.raises(ValueError, match="activation must be one of relu, hardtanh; got 'gelu'"):
        DigitsConvNet(activation="gelu")


def test_mlp_has_dropout_where_it_is_asked_for_and_needs_an_input_and_an_output() -> None:
    def kinds(network: nn.Module) -> list[str]:
        return [type(layer).__name__ for layer in network]  # type: ignore[attr-defined]  # a Sequential

    assert kinds(MLP(widths=(4, 3, 2))) == ["Flatten", "Linear", "ReLU", "Linear"]
    dropped = MLP(widths=(4, 3, 2), dropout=0.5, input_dropout=0.25)
    assert kinds(dropped) == ["Flatten", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert [layer.p for layer in dropped if isinstance(layer, nn.Dropout)] == [0.25, 0.5]
    with pytest.raises(ValueError, match=r"widths of MLP must have at least two numbers, .* got \[784\]"):
        MLP(widths=[784])


def test_caffe_lenet5_has_one_relu() -> None:
    assert sum(isinstance(m, nn.ReLU) for m in LeNet5(conv_relu=False)) == 1
    assert sum(isinstance(m, nn.ReLU) for m in LeNet5()) == 3


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (DigitsConvNet(num_classes=3, in_channels=2, image_size=16), (2, 16, 16)),
        (LeNet300(in_features=64, num_classes=3), (1, 8, 8)),
        (MLP(widths=(64, 5, 3)), (1, 8, 8)),
        (LeNet5(in_channels=3, num_classes=3), (3, 28, 28)),
        (ResNet20(width=4, in_channels=1, num_classes=3), (1, 28, 28)),
    ],
)
def test_every_size_argument_is_used_and_every_parameter_gets_a_gradient(
    network: nn.Module, shape: tuple[int, ...]
) -> None:
    output = network(torch.randn(4, *shape))
    assert output.shape == (4, 3)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
