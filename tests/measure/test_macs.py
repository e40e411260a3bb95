from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.measure.macs import count_macs


class _Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()


X = torch.randn(2, 5, 8)
ATTENTION = 3 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 5 * 8 * 8  # in-projection, scores and mixing, out-projection

COUNTED_BY_HAND = {
    "linear": (nn.Linear(8, 3), X, 5 * 8 * 3),
    "shared linear, twice": (nn.Sequential(*[nn.Linear(8, 8)] * 2), X, 2 * 5 * 8 * 8),
    "conv1d, stride and dilation": (nn.Conv1d(3, 4, 5, stride=2, dilation=2), torch.randn(2, 3, 20), 6 * 3 * 4 * 5),
    "conv2d, padded": (nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 10, 10), 100 * 3 * 8 * 9),
    "conv2d, grouped": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), 9 * (4 // 2) * 6 * 9),
    "conv2d, depthwise": (nn.Conv2d(4, 4, 3, groups=4), torch.randn(2, 4, 9, 9), 49 * 4 * 9),
    "conv3d": (nn.Conv3d(2, 3, 3), torch.randn(2, 2, 5, 5, 5), 27 * 2 * 3 * 27),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), 25 * 4 * (6 // 2) * 9),
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True).eval(), (X, X, X), ATTENTION),
    "attention function": (_Call(F.scaled_dot_product_attention), (torch.randn(2, 3, 5, 8),) * 3, 3 * 2 * 5 * 5 * 8),
    "transformer": (nn.Sequential(_encoder_layer(), _encoder_layer()), X, 2 * (ATTENTION + 2 * 5 * 8 * 16)),
    "lstm": (nn.LSTM(8, 6, batch_first=True).eval(), X, 5 * 4 * 6 * (8 + 6)),
    "lstm, both ways": (nn.LSTM(8, 6, batch_first=True, bidirectional=True), X, 2 * 5 * 4 * 6 * (8 + 6)),
    "gru": (nn.GRU(8, 6, batch_first=True), X, 5 * 3 * 6 * (8 + 6)),
    "gru cell": (nn.GRUCell(8, 6), X[:, 0], 3 * 6 * (8 + 6)),
    "einsum": (_Call(lambda x: torch.einsum("bij,bkj->bik", x, x)), X, 5 * 5 * 8),
}


@pytest.mark.parametrize("case", COUNTED_BY_HAND)
def test_macs_are_those_counted_by_hand(case: str) -> None:
    model, example_inputs, expected = COUNTED_BY_HAND[case]
    assert count_macs(model, example_inputs) == (expected, ())


def test_macs_are_per_sample() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 4))
    assert len({count_macs(model, torch.randn(batch, 1, 5, 5)) for batch in (1, 2, 7)}) == 1


def test_inference_mode_changes_nothing() -> None:
    model, example_inputs, expected = COUNTED_BY_HAND["transformer"]
    with torch.inference_mode():
        assert count_macs(model, example_inputs) == (expected, ())


def test_common_layers_leave_nothing_uncounted() -> None:
    image = torch.randn(2, 4, 6, 6)
    activations = (
        "ReLU ReLU6 ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh Sigmoid Tanh Softplus Softsign"
    )
    activations += " LeakyReLU PReLU LogSigmoid Softmax2d GLU Tanhshrink Softshrink Hardshrink Dropout RReLU"
    layers = [getattr(nn, name)() for name in activations.split()]
    in_place = (nn.ReLU, nn.ReLU6, nn.ELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.LeakyReLU, nn.RReLU)
    layers += [layer(inplace=True) for layer in in_place]
    layers += [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
    ]
    layers += [nn.LayerNorm(6), nn.RMSNorm(6), nn.LocalResponseNorm(2), nn.Softmax(1), nn.LogSoftmax(1)]
    layers += [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.LPPool2d(2, 2)]
    layers += [nn.AdaptiveMaxPool2d(2), nn.Upsample(scale_factor=2), nn.PixelShuffle(2), nn.ReflectionPad2d(1)]
    layers += [nn.ZeroPad2d(1), nn.CircularPad2d(1), nn.Unfold(2), nn.Flatten(), nn.ChannelShuffle(2)]
    layers += [_Call(lambda x: x.softmax(-1).argmax(-1).roll(1, 0).sum().item())]
    layers += [_Call(lambda x: torch.where(x > 0, x, x.mean((2, 3), keepdim=True)).chunk(2, 1))]
    layers += [_Call(lambda x: F.normalize(torch.cat([x, x.flip(1)]).permute(0, 2, 3, 1).contiguous()[:, ::2]))]
    layers += [
        _Call(lambda x: torch.zeros_like(x).masked_fill_(x > 0, 1).var() + x.unsqueeze_(0).transpose_(0, 1)[x > 0])
    ]
    uncounted = {str(layer): count_macs(layer.eval(), image.clone()) for layer in layers}
    assert {name: result for name, result in uncounted.items() if result != (0, ())} == {}


@torch.library.custom_op("test_macs::twice", mutates_args=())
def _twice(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (torch.fft.rfft, ("aten._fft_r2c",)),
        (lambda x: x.cumsum(-1).sort(), ("aten.cumsum", "aten.sort")),
        (lambda x: x.topk(2), ("aten.topk",)),
        (lambda x: x[0] @ x[0, 0], ("aten.mv",)),
        (_twice, ("test_macs.twice",)),
        (torch.linalg.svdvals, ("aten._linalg_svd",)),
        (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), ("aten.upsample_linear1d",)),
        (lambda x: torch.cdist(x, x), ("aten._cdist_forward",)),
        (lambda x: torch.sparse.mm(x[0].to_sparse(), x[0].T), ("aten._sparse_addmm", "aten._to_sparse")),
    ],
)
def test_operators_without_a_formula_are_named(function: Callable[..., Any], names: tuple[str, ...]) -> None:
    assert count_macs(_Call(function), X)[1] == names


def test_counted_and_uncounted_work_stand_side_by_side() -> None:
    model = nn.Sequential(nn.Linear(8, 3), _Call(lambda x: x.cumsum(-1)))
    assert count_macs(model, X) == (5 * 8 * 3, ("aten.cumsum",))


@pytest.mark.parametrize("fails", [False, True])
def test_kernels_are_as_fused_as_before(fails: bool) -> None:
    def flags() -> tuple[bool, ...]:
        backends = torch.backends
        cuda = torch.backends.cuda
        return (
            *(backends.mkldnn.enabled, backends.cudnn.enabled, backends.mha.get_fastpath_enabled()),
            *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        )

    before = flags()
    assert all(before)
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(flags())
        return x @ x if fails else x

    try:
        count_macs(_Call(look), X)
    except RuntimeError:
        assert fails
    assert seen[0] != before
    assert flags() == before


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # the flop counter hooks every module, dynamo says so
def test_compiled_network_counts_as_it_did_before_compilation() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(X)
    assert count_macs(compiled, X) == count_macs(model, X)
