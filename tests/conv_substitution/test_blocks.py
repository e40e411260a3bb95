"""The forms: sizes by the formulas, the layer's shapes, and values with which they compute what the fits say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import load_compressed, save_compressed
from lightning_compress.conv_substitution.blocks import FORMS, Block, numbers_for
from lightning_compress.conv_substitution.values import Seen, values, white_noise
from lightning_compress.replacement.layer import LayerShape, linear_map
from lightning_compress.replacement.record import note_replaced
from lightning_compress.replacement.swap import swap

BLOCKS = list(FORMS)
ODD: list[dict[str, Any]] = [
    {"padding": 1},
    {"padding": 0, "bias": False},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": "reflect", "bias": False},
]


def conv(dims: int = 2, kernel: Any = 3, inputs: int = 4, outputs: int = 6, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        return kind(inputs, outputs, kernel, **options).double()  # type: ignore[no-any-return]


def images(dims: int = 2, inputs: int = 4, n: int = 3) -> Tensor:
    return torch.randn(n, inputs, *[9] * dims, generator=torch.Generator().manual_seed(1)).double()


def become(layer: nn.Module, block: str, *, svd: bool = True, **chosen: Any) -> nn.Module:
    found = linear_map(layer)
    numbers = numbers_for(found.sizes, block, **chosen)
    given = values(found, block, numbers, white_noise(found, block)) if svd else None
    swap(layer, FORMS[block], numbers, given)
    return layer


def counted(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return int(counter.get_total_flops()) // 2


def test_the_lecture_s_example_has_72_parameters_and_then_26() -> None:
    layer = conv(inputs=2, outputs=4, bias=False)
    assert sum(one.numel() for one in layer.parameters()) == 72
    become(layer, "separable")
    assert sum(one.numel() for one in layer.parameters()) == 26


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", ODD)
def test_a_block_has_the_layer_s_shapes_and_the_parameters_and_multiplications_of_its_formula(
    block: str, options: dict[str, Any]
) -> None:
    layer, x = conv(**options), images()
    expected = layer(x)
    of = linear_map(layer).sizes
    become(layer, block)
    got = layer(x)
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert isinstance(layer, Block)
    assert sum(one.numel() for one in layer.parameters()) == type(layer).parameters_of(of, layer.numbers)
    at_input, at_output = type(layer).cost(of, layer.numbers)
    assert counted(layer, x) == len(x) * (at_input * 81 + at_output * got[0, 0].numel())


@pytest.mark.parametrize("block", BLOCKS)
def test_formulas_are_those_of_the_papers(block: str) -> None:
    of = LayerShape(kind="conv", shape=(64, 32, 3, 3), bias=False)
    expected = {
        "separable": 9 * 32 + 32 * 64,
        "xception": 32 * 64 + 9 * 64,
        "fire": 32 * 8 + 8 * 32 + 9 * 8 * 32,
        "ghost": 9 * 32 * 32 + 9 * 32,
        "shuffle": 32 * 64 // 2 + 9 * 64 + 64 * 64 // 2,
    }
    assert FORMS[block].parameters_of(of, numbers_for(of, block)) == expected[block]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dims", [1, 3])
def test_blocks_of_convolutions_over_one_and_three_dimensions(block: str, dims: int) -> None:
    layer, x = conv(dims, padding=1, stride=2), images(dims)
    expected = layer(x)
    assert become(layer, block)(x).shape == expected.shape


@pytest.mark.parametrize("options", ODD)
@pytest.mark.parametrize(
    ("block", "chosen"),
    [
        ("separable", {"multiplier": 6}),
        ("xception", {"multiplier": 4}),
        ("fire", {"squeeze": 1.0}),
        ("shuffle", {"groups": 1}),
        ("ghost", {}),
    ],
)
def test_a_block_with_enough_parts_computes_what_the_layer_does(
    block: str, chosen: dict[str, Any], options: dict[str, Any]
) -> None:
    layer, x = conv(**options), images()
    with torch.no_grad():
        if block == "fire":  # half of the outputs look at the centre only
            layer.weight[::2] *= torch.zeros(3, 3).index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(1.0))
        elif block == "shuffle":
            factors = [torch.randn(6, n, generator=torch.Generator().manual_seed(n)).double() for n in (6, 4, 3, 3)]
            layer.weight.copy_(torch.einsum("ho,hi,ha,hb->oiab", *factors))
        elif block == "ghost":  # half of the outputs are multiples of others
            layer.weight[3:] = 2 * layer.weight[:3]
    expected = layer(x)
    if block == "shuffle":  # its fit goes step by step, and gets near
        become(layer, block, **chosen)
        assert float((layer(x) - expected).std() / expected.std()) < 0.6
        return
    torch.testing.assert_close(become(layer, block, **chosen)(x), expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("dims", [1, 2])
def test_all_terms_of_a_decoupled_kernel_are_exact_to_1e_10(dims: int) -> None:
    for block in ("separable", "xception"):
        layer, x = conv(dims, outputs=12, inputs=10, padding=1), images(dims, inputs=10)
        expected = layer(x)
        torch.testing.assert_close(become(layer, block, multiplier=3**dims)(x), expected, atol=1e-10, rtol=0)
        assert all(one.out_channels == one.in_channels for one in layer.children() if one.groups > 1)  # type: ignore[union-attr]


def seen_of(layer: nn.Module, x: Tensor) -> Seen:
    """By torch's unfold."""
    patches = nn.functional.unfold(x, 3, padding=1).view(len(x), x.shape[1], 9, -1).permute(0, 3, 1, 2).flatten(0, 1)
    y = layer(x).detach()
    near = nn.functional.unfold(y, 3, padding=1).view(len(y), y.shape[1], 9, -1).permute(0, 3, 1, 2).flatten(0, 1)
    mean, near_mean = patches.mean(0), near.mean(0)
    patches, near = patches - mean, near - near_mean
    n = len(patches)
    return Seen(
        torch.einsum("nik,njl->ikjl", patches, patches) / n,
        mean,
        torch.einsum("nak,nb->akb", near, near[:, :, 4]) / n,
        torch.einsum("nak,nal->akl", near, near) / n,
        near_mean,
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_data_lead_to_a_smaller_difference_of_the_outputs_than_the_weight_alone(block: str) -> None:
    x = images(n=8)
    x = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 3, 1).relu() * torch.tensor(
        [5.0, 1.0, 2.0, 0.2]
    ).view(1, 4, 1, 1)
    losses = {}
    for way in ("svd", "data"):
        layer = conv(padding=1)
        expected, found = layer(x).detach(), linear_map(layer)
        seen = white_noise(found, block) if way == "svd" else seen_of(layer, x)
        numbers = numbers_for(found.sizes, block)
        swap(layer, FORMS[block], numbers, values(found, block, numbers, seen))
        gap = layer(x).detach() - expected
        losses[way] = float(gap.var((0, 2, 3)).sum())
        if way == "data":
            assert float(gap.mean((0, 2, 3)).abs().max()) < 1e-6  # the bias takes the mean
    assert losses["data"] < losses["svd"]


def test_ghosts_of_a_layer_with_three_outputs_for_each_computed_one() -> None:
    layer, x = conv(outputs=7, padding=1), images()
    with torch.no_grad():
        layer.weight[3:6] = 2 * layer.weight[:3]
        layer.weight[6] = -layer.weight[1]
    expected = layer(x)
    torch.testing.assert_close(become(layer, "ghost", ratio=3)(x), expected, atol=1e-8, rtol=1e-8)
    assert layer.primary.out_channels == 3


@pytest.mark.parametrize(
    ("block", "options", "chosen", "message"),
    [
        ("separable", {"groups": 2}, {}, "groups=2"),
        ("separable", {}, {"multiplier": 0}, "terms must be an integer from 1 on; got 0"),
        ("separable", {}, {"multiplier": 7}, "terms=7 is more than 6, with which it would be exact"),
        ("ghost", {}, {"ratio": 9}, "ratio must be at most its 6 outputs; got 9"),
        ("ghost", {}, {"ratio": 1}, "ratio must be an integer from 2 on; got 1"),
        ("shuffle", {}, {"groups": 3}, "groups=3 does not divide its 4 inputs"),
        ("fire", {"kernel": 2}, {}, r"kernel of \(2, 2\) has no centre"),
        ("xception", {"kernel": 1}, {}, "1x1"),
    ],
)
def test_layers_that_a_block_cannot_stand_in_for(
    block: str, options: dict[str, Any], chosen: dict[str, Any], message: str
) -> None:
    layer = conv(**options)
    with pytest.raises(ValueError, match=message):
        become(layer, block, svd=False, **chosen)
    assert type(layer) is nn.Conv2d


def test_random_values_are_torch_s_own_and_depend_on_the_caller_s_generator() -> None:
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(become(conv(padding=1), "fire", svd=False)(images()))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("options", ODD)
@pytest.mark.parametrize("block", [one for one in BLOCKS if one != "ghost"])
def test_a_block_is_the_convolution_of_its_dense_weight(block: str, options: dict[str, Any]) -> None:
    layer, same, x = become(conv(**options), block), conv(**options), images()
    assert isinstance(layer, Block)
    weight, bias = layer.dense_weight()
    with torch.no_grad():
        same.weight.copy_(weight)
        if bias is not None:
            same.bias.copy_(bias)
    torch.testing.assert_close(same(x), layer(x))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_file_of_a_network_with_blocks_changes_the_dense_class_and_back(block: str, tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(conv(padding=1), nn.ReLU())

    other, x = network(), images()
    dense = {name: one.clone() for name, one in other.state_dict().items()}
    expected = other(x)
    become(other[0], block)
    note_replaced(other[0], "conv_block")
    save_compressed(other, tmp_path / "small.lcz")
    again = load_compressed(tmp_path / "small.lcz", network())
    assert type(again[0]) is FORMS[block]
    torch.testing.assert_close(again(x), other(x), atol=1e-6, rtol=1e-5)
    other.load_state_dict(dense)
    assert type(other[0]) is nn.Conv2d
    torch.testing.assert_close(other(x), expected)
