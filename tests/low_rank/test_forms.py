"""Every form against the layer that it replaces: at the highest rank, and by what the outputs change at lower ones."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.low_rank.forms import FORMS
from lightning_compress.low_rank.splits import Moments, Splits
from lightning_compress.replacement.layer import linear_map
from lightning_compress.replacement.swap import Replaced, restore, swap

CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (2, 1), "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 2},
]
LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 9), (6,)),
    (nn.Linear(9, 6, bias=False), (4, 9)),
    *((nn.Conv2d(4, 6, **options), (4, 7, 8)) for options in CONVS),
    (nn.Conv2d(6, 6, 1, stride=2), (6, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4), (4, 6, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (4, 11)),
    (nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 0, 0)), (2, 5, 6, 4)),
]
CASES = [
    pytest.param(layer, shape, form, id=f"{form}-{layer}")
    for layer, shape in LAYERS
    for form in ("linear", "channel", "spatial", "tucker")
    if FORMS[form].refused(linear_map(layer).sizes) is None
]


def double(layer: nn.Module, seed: int = 0) -> Any:
    layer = copy.deepcopy(layer).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def inputs_of(shape: tuple[int, ...], samples: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return drawn + 0.5 * drawn.roll(1, 1) + 1.0  # neighbours are alike, and the mean is not zero


def moments_of(layer: Any, x: Tensor) -> list[Moments]:
    """Of the unfolded inputs: each is found by a kernel that picks one place of the patch."""
    found = []
    groups = getattr(layer, "groups", 1)
    for part in x.chunk(groups, 1) if groups > 1 else [x]:
        if isinstance(layer, nn.Linear):
            rows = part.reshape(-1, part.shape[-1])
        else:
            n_in, *kernel = layer.weight.shape[1:]
            size = layer.weight[0].numel()
            picks = double(
                type(layer)(
                    n_in,
                    size,
                    kernel,
                    layer.stride,
                    layer.padding,
                    layer.dilation,
                    bias=False,
                    padding_mode=layer.padding_mode,
                )
            )
            picks.weight.data.copy_(torch.eye(size).reshape(size, n_in, *kernel))
            rows = picks(part).detach().flatten(2).transpose(1, 2).reshape(-1, size)
        centred = rows - rows.mean(0)
        found.append(Moments(rows.mean(0), centred.T @ centred / len(rows)))
    return found


def put(layer: nn.Module, form: str, numbers: tuple[int, ...], moments: Any = None) -> Any:
    splits = Splits(linear_map(layer), moments)
    swap(layer, FORMS[form], dict(zip(FORMS[form].names, numbers, strict=True)), splits.values(form, numbers))
    return layer


@pytest.mark.parametrize("with_data", [False, True], ids=["plain", "data"])
@pytest.mark.parametrize(("layer", "shape", "form"), CASES)
def test_the_highest_rank_computes_what_the_layer_did(
    layer: nn.Module, shape: tuple[int, ...], form: str, with_data: bool
) -> None:
    layer, x = double(layer), inputs_of(shape)
    dense = copy.deepcopy(layer)
    most = FORMS[form].most(linear_map(layer).sizes)
    layer = put(layer, form, most, moments_of(dense, x[:2]) if with_data else None)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-10, atol=1e-10)
    weight, bias = layer.dense_weight()
    torch.testing.assert_close(weight, dense.weight.data, rtol=1e-10, atol=1e-10)
    assert (bias is None) == (dense.bias is None)


@pytest.mark.parametrize(("layer", "shape", "form"), CASES)
def test_what_is_lost_at_a_low_rank_is_what_the_outputs_lose(
    layer: nn.Module, shape: tuple[int, ...], form: str
) -> None:
    dense, x = double(layer), inputs_of(shape)
    moments = moments_of(dense, x)
    splits = Splits(linear_map(dense), moments)
    y = dense(x)
    axes = [axis for axis in range(y.dim()) if axis != (y.dim() - 1 if isinstance(dense, nn.Linear) else 1)]
    variance = float((y - y.mean(axes, keepdim=True) if dense.bias is not None else y).square().sum())
    most = FORMS[form].most(linear_map(dense).sizes)
    for numbers in {tuple(max(1, one // 2) for one in most), (1,) * len(most)}:
        thin = put(copy.deepcopy(dense), form, numbers, moments)
        z = thin(x)
        if dense.bias is not None:
            torch.testing.assert_close(z.mean(axes), y.mean(axes))
        (lost,) = splits.lost(form, [numbers])
        found = float((y - z).square().sum()) / variance
        if form == "tucker":
            assert found <= lost * (1 + 1e-6) + 1e-10  # HOOI has gone on
        else:
            assert found == pytest.approx(lost, rel=1e-6, abs=1e-9)
        weight, bias = thin.dense_weight()
        restore(thin, weight, bias)
        assert type(thin) is type(dense)
        torch.testing.assert_close(thin(x), z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("layer", "shape", "form"), CASES)
def test_real_inputs_lose_less_with_them_than_without(layer: nn.Module, shape: tuple[int, ...], form: str) -> None:
    dense, x = double(layer), inputs_of(shape)
    numbers = tuple(max(1, one // 2) for one in FORMS[form].most(linear_map(dense).sizes))
    y = dense(x)
    plain, data = (put(copy.deepcopy(dense), form, numbers, one)(x) for one in (None, moments_of(dense, x)))
    assert float((y - data).square().sum()) <= float((y - plain).square().sum()) * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(20, 6), (5, 8)])
def test_an_embedding_reaches_the_bound_for_how_often_its_entries_are_read(shape: tuple[int, int]) -> None:
    dense = double(nn.Embedding(*shape))
    counts = torch.arange(1, shape[0] + 1, dtype=torch.float64)
    shares = counts / counts.sum()
    values = torch.linalg.svdvals(shares.sqrt()[:, None] * dense.weight.data).square()
    splits = Splits(linear_map(dense), shares)
    entries = torch.arange(shape[0])
    for rank in range(1, min(shape) + 1):
        thin = put(copy.deepcopy(dense), "embedding", (rank,), shares)
        change = (thin(entries) - dense(entries)).square().sum(1)
        assert float(shares @ change) == pytest.approx(float(values[rank:].sum()), abs=1e-12)
        assert splits.lost("embedding", [(rank,)])[0] == pytest.approx(
            float(values[rank:].sum() / values.sum()), abs=1e-12
        )
    torch.testing.assert_close(thin(entries), dense(entries), rtol=1e-10, atol=1e-10)
    plain = put(copy.deepcopy(dense), "embedding", (2,))
    left, sizes, right = torch.linalg.svd(dense.weight.data, full_matrices=False)
    torch.testing.assert_close(plain(entries), (left[:, :2] * sizes[:2]) @ right[:2])


def test_the_entry_of_an_embedding_that_pads_stays_untrained() -> None:
    layer = put(nn.Embedding(9, 6, padding_idx=3), "embedding", (4,))
    layer(torch.tensor([3, 4])).sum().backward()
    assert layer.first.weight.grad[3].abs().max() == 0 < layer.first.weight.grad[4].abs().max()


def test_a_tied_output_matrix_goes_on_sharing_the_entries() -> None:
    embedding, output = double(nn.Embedding(12, 5)), double(nn.Linear(5, 12), seed=1)
    output.weight = embedding.weight
    of_embedding, of_output = Splits(linear_map(embedding), None), Splits(linear_map(output), None)
    embedding_values = of_embedding.values("embedding", (3,))
    output_values = of_output.values("linear", (3,)) | {"second.weight": embedding_values["first.weight"]}
    swap(embedding, FORMS["tied_embedding"], {"rank": 3}, embedding_values)
    swap(output, FORMS["tied_linear"], {"rank": 3}, output_values)
    assert embedding.first.weight is output.second.weight


def test_what_costs_are_counted_is_what_the_parts_have() -> None:
    layer = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
    found = {}
    for form, numbers in {"channel": (8,), "spatial": (8,), "tucker": (4, 8)}.items():
        thin: Any = put(copy.deepcopy(layer), form, numbers)
        found[form] = sum(parameter.numel() for parameter in thin.parameters())
        assert thin(torch.zeros(1, 16, 9, 9)).shape == (1, 32, 5, 5)
    assert found == {"channel": 8 * (9 * 16 + 32), "spatial": 8 * 3 * (16 + 32), "tucker": 16 * 4 + 9 * 4 * 8 + 8 * 32}


@pytest.mark.parametrize(
    ("form", "numbers", "message"),
    [
        ("linear", {"rank": 4}, "it is for linear layers, and this is one of kind conv"),
        ("spatial", {"rank": 4}, "two sizes above 1, and this one has 3 x 1"),
        ("channel", {"rank": 0}, "rank must be from 1 to 6; got 0"),
        ("channel", {"rank": 7}, "rank must be from 1 to 6; got 7"),
        ("channel", {"rank": 2.0}, "rank must be from 1 to 6; got 2.0"),
        ("channel", {"ranks": 2}, "has the numbers rank"),
        ("tucker", {"rank_in": 5, "rank_out": 1}, "rank_in must be from 1 to 4; got 5"),
    ],
)
def test_a_form_that_a_layer_cannot_take_is_refused(form: str, numbers: dict[str, Any], message: str) -> None:
    layer = nn.Conv2d(4, 6, (3, 1))
    with pytest.raises(ValueError, match=message):
        swap(layer, FORMS[form], numbers)
    assert type(layer) is nn.Conv2d


def test_training_reaches_all_parts() -> None:
    x = inputs_of((4, 7, 8))
    for form, numbers in (("channel", (3,)), ("spatial", (3,)), ("tucker", (2, 3))):
        layer = put(double(nn.Conv2d(4, 6, 3)), form, numbers)
        assert isinstance(layer, Replaced)
        F.mse_loss(layer(x), torch.zeros(())).backward()
        for parameter in itertools.chain(layer.parameters()):
            assert parameter.grad is not None
            assert float(parameter.grad.abs().max()) > 0
