"""The fits of blocks against explicit design matrices, singular value decompositions and brute force."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.conv_substitution import decoupling, ghosts, shuffled, squeezed
from lightning_compress.conv_substitution.least_squares import difference, moved, white

OUTPUTS, INPUTS, TAPS = 6, 4, 9


def weight(seed: int = 0, outputs: int = OUTPUTS, inputs: int = INPUTS) -> Tensor:
    return torch.randn(outputs, inputs, TAPS, generator=torch.Generator().manual_seed(seed)).double()


def patches(seed: int = 1, inputs: int = INPUTS, n: int = 400) -> Tensor:
    """Patches (n, I, K) whose channels and taps are correlated, with a mean of zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs * TAPS, inputs * TAPS, generator=generator).double()
    found = torch.randn(n, inputs * TAPS, generator=generator).double() @ mixed
    return (found - found.mean(0)).view(n, inputs, TAPS)


def covariance(x: Tensor) -> Tensor:
    return torch.einsum("nik,njl->ikjl", x, x) / len(x)


def lost(found: Tensor, target: Tensor, x: Tensor) -> float:
    """By the outputs themselves."""
    return float(torch.einsum("oik,nik->no", found - target, x).square().mean(0).sum())


def lstsq(design: Tensor, target: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.lstsq(design.numpy(), target.numpy(), rcond=None)[0])


def test_difference_is_that_of_the_outputs() -> None:
    x, one, other = patches(), weight(0), weight(2)
    assert float(difference(one, other, covariance(x)).sum()) == pytest.approx(lost(one, other, x))


@pytest.mark.parametrize("outputs", [OUTPUTS, 12])
def test_decoupling_is_exact_with_all_terms_and_the_best_with_fewer(outputs: int) -> None:
    target = weight(outputs=outputs)
    full = decoupling.separable_weight(*decoupling.decouple_separable(target, min(outputs, TAPS)))
    torch.testing.assert_close(full, target, atol=1e-10, rtol=0)
    full = decoupling.xception_weight(*decoupling.decouple_xception(target, INPUTS))
    torch.testing.assert_close(full, target, atol=1e-10, rtol=0)
    for terms in (1, 2, 3):
        found = decoupling.separable_weight(*decoupling.decouple_separable(target, terms))
        for i in range(INPUTS):  # Eckart and Young, for each input channel
            dropped = np.linalg.svd(target[:, i].numpy(), compute_uv=False)[terms:]
            gap = float((found - target)[:, i].square().sum())
            assert gap == pytest.approx(float((dropped**2).sum()), rel=1e-10)
        found = decoupling.xception_weight(*decoupling.decouple_xception(target, terms))
        for o in range(outputs):
            dropped = np.linalg.svd(target[o].numpy(), compute_uv=False)[terms:]
            gap = float((found - target)[o].square().sum())
            assert gap == pytest.approx(float((dropped**2).sum()), rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("terms", [1, 2])
def test_pointwise_of_separable_is_least_squares_on_the_filtered_inputs(terms: int) -> None:
    target, x = weight(), patches()
    start = decoupling.decouple_separable(target, terms)
    pointwise, depthwise = decoupling.fit_separable(target, covariance(x), *start, rounds=0)
    torch.testing.assert_close(depthwise, start[1])
    filtered = torch.einsum("tik,nik->nti", depthwise, x).flatten(1)
    expected = lstsq(filtered, torch.einsum("oik,nik->no", target, x))
    torch.testing.assert_close(pointwise.flatten(1), expected.T, atol=1e-6, rtol=1e-6)


def test_filters_of_separable_are_least_squares_of_one_channel_after_the_other() -> None:
    target, x = weight(), patches()
    pointwise, depthwise = decoupling.decouple_separable(target, 2)
    found = decoupling._fit_filters(target, covariance(x), pointwise, depthwise)
    by_hand = depthwise.clone()
    for i in range(INPUTS):
        rest = by_hand.clone()
        rest[:, i] = 0
        residual = torch.einsum("oik,nik->no", target - decoupling.separable_weight(pointwise, rest), x)
        design = torch.einsum("ot,nk->notk", pointwise[:, :, i], x[:, i]).reshape(-1, 2 * TAPS)
        by_hand[:, i] = lstsq(design, residual.reshape(-1)).view(2, TAPS)
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-6)


def test_steps_of_xception_are_least_squares_of_each_output(monkeypatch: pytest.MonkeyPatch) -> None:
    target, x = weight(), patches()
    start = decoupling.decouple_xception(target, 2)
    pointwise, depthwise = decoupling.fit_xception(target, covariance(x), *start, rounds=0)
    for o in range(OUTPUTS):
        design = torch.einsum("tk,nik->nti", depthwise[:, o], x).flatten(1)
        expected = lstsq(design, torch.einsum("ik,nik->n", target[o], x))
        torch.testing.assert_close(pointwise[:, o].flatten(), expected, atol=1e-6, rtol=1e-6)
    whole = decoupling.fit_xception(target, covariance(x), *start)
    monkeypatch.setattr(decoupling, "_CHUNK", 1)  # one output at a time
    for one, other in zip(whole, decoupling.fit_xception(target, covariance(x), *start), strict=True):
        torch.testing.assert_close(one, other)


def shuffled_by_torch(first: Tensor, filters: Tensor, last: Tensor, groups: int, x: Tensor) -> Tensor:
    """What torch's convolutions and ShuffleNet's shuffle answer for images (N, I, H, W)."""
    hidden = len(first)
    order = torch.arange(hidden).view(groups, -1).T.flatten()  # the shuffle: view (G, n), transpose
    unshuffled = torch.empty_like(first)
    unshuffled[order] = first
    y = F.conv2d(x, unshuffled[:, :, None, None], groups=groups)
    y = y.view(len(x), groups, hidden // groups, *x.shape[2:]).transpose(1, 2).reshape(len(x), hidden, *x.shape[2:])
    y = F.conv2d(y, filters.view(hidden, 1, 3, 3), padding=1, groups=hidden)
    return F.conv2d(y, last[:, :, None, None], groups=groups)


@pytest.mark.parametrize(("hidden", "groups"), [(8, 2), (6, 2), (4, 1), (8, 4)])
def test_shuffle_weight_is_what_grouped_convolutions_and_a_shuffle_compute(hidden: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(hidden, 4 // groups, generator=generator).double()
    filters = torch.randn(hidden, 9, generator=generator).double()
    last = torch.randn(8, hidden // groups, generator=generator).double()
    x = torch.randn(2, 4, 5, 5, generator=generator).double()
    whole = shuffled.shuffle_weight(first, filters, last).view(8, 4, 3, 3)
    torch.testing.assert_close(shuffled_by_torch(first, filters, last, groups, x), F.conv2d(x, whole, padding=1))


def test_last_convolution_of_shuffle_is_least_squares_and_each_step_gets_nearer() -> None:
    target, x = weight(outputs=8), patches()
    parts = shuffled.start_shuffle(target, 8, 2)
    first, filters, last = shuffled.fit_shuffle(target, covariance(x), parts, rounds=0)
    for group in range(2):
        maps = torch.zeros(4, INPUTS, TAPS).double()
        for place in range(4):
            h = group * 4 + place
            maps[place, h % 2 * 2 : h % 2 * 2 + 2] = torch.outer(first[h], filters[h])
        design = torch.einsum("hik,nik->nh", maps, x)
        expected = lstsq(design, torch.einsum("oik,nik->no", target[group * 4 : group * 4 + 4], x))
        torch.testing.assert_close(last[group * 4 : group * 4 + 4], expected.T, atol=1e-6, rtol=1e-6)
    losses = [
        lost(shuffled.shuffle_weight(*shuffled.fit_shuffle(target, covariance(x), parts, rounds=n)), target, x)
        for n in range(4)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_hidden_channel_of_shuffle_is_least_squares_of_the_first_convolution_and_then_of_the_filter() -> None:
    target, x = weight(outputs=8), patches()
    first, filters, last = shuffled.fit_shuffle(target, covariance(x), shuffled.start_shuffle(target, 4, 2), rounds=0)
    found = first.clone(), filters.clone()
    shuffled._fit_hidden(target, covariance(x), *found, last)
    for h in range(4):
        group, source = slice(h // 2 * 4, h // 2 * 4 + 4), slice(h % 2 * 2, h % 2 * 2 + 2)
        column = last[group, h % 2]
        for part in (first, filters):
            kept = first[h].clone()
            first[h] = 0
            rest = torch.einsum("oik,nik->no", target - shuffled.shuffle_weight(first, filters, last), x)[:, group]
            first[h] = kept
            if part is first:
                seen = torch.einsum("nik,k->ni", x[:, source], filters[h])
            else:
                seen = torch.einsum("nik,i->nk", x[:, source], first[h])
            design = torch.einsum("o,ni->noi", column, seen).flatten(0, 1)
            part[h] = lstsq(design, rest.flatten())
    torch.testing.assert_close(found[0], first, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1], filters, atol=1e-6, rtol=1e-6)


def test_shuffle_with_one_group_and_all_hidden_channels_is_exact() -> None:
    target = weight(outputs=4)
    parts = shuffled.fit_shuffle(target, white(target), shuffled.start_shuffle(target, 4 * 9, 1), rounds=30)
    assert lost(shuffled.shuffle_weight(*parts), target, patches()) < 1e-6 * lost(0 * target, target, patches())


def test_fire_is_exact_where_its_squeeze_is_as_wide_as_the_inputs_and_no_filter_is_pointwise() -> None:
    target, x = weight(), patches()
    squeeze, expand, chosen = squeezed.fit_fire(
        target, covariance(x), squeezed.start_squeeze(target, INPUTS), 0, rounds=1
    )
    assert not len(chosen)
    torch.testing.assert_close(squeezed.fire_weight(squeeze, expand), target, atol=1e-6, rtol=1e-6)


def test_expansion_of_fire_is_least_squares_on_the_squeezed_inputs_and_takes_the_best_outputs() -> None:
    target, x = weight(), patches()
    squeeze = squeezed.start_squeeze(target, 2)
    _, expand, chosen = squeezed.fit_fire(target, covariance(x), squeeze, 3, rounds=0)
    seen, wanted = torch.einsum("si,nik->nsk", squeeze, x), torch.einsum("oik,nik->no", target, x)
    whole, centre = lstsq(seen.flatten(1), wanted), lstsq(seen[:, :, 4], wanted)
    gap = (seen[:, :, 4] @ centre - wanted).square().sum(0) - (seen.flatten(1) @ whole - wanted).square().sum(0)
    assert chosen.tolist() == sorted(gap.argsort()[:3].tolist())
    for o in range(OUTPUTS):
        expected = torch.zeros(2, TAPS).double()
        if o in chosen.tolist():
            expected[:, 4] = centre[:, o]
        else:
            expected = whole[:, o].view(2, TAPS)
        torch.testing.assert_close(expand[o], expected, atol=1e-6, rtol=1e-6)


def test_squeeze_of_fire_is_least_squares_of_one_channel_after_the_other() -> None:
    target, x = weight(), patches()
    squeeze, expand, _ = squeezed.fit_fire(target, covariance(x), squeezed.start_squeeze(target, 2), 3, rounds=0)
    found = squeeze.clone()
    squeezed._fit_squeeze(target, covariance(x), found, expand)
    for s in range(2):
        squeeze[s] = 0
        rest = torch.einsum("oik,nik->no", target - squeezed.fire_weight(squeeze, expand), x)
        design = torch.einsum("ok,nik->noi", expand[:, s], x).flatten(0, 1)
        squeeze[s] = lstsq(design, rest.flatten())
    torch.testing.assert_close(found, squeeze, atol=1e-6, rtol=1e-6)


def test_pivots_are_those_of_qr_with_column_pivoting() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(3)).double() * torch.arange(1, 10)
    expected = linalg.qr(x.numpy(), pivoting=True, mode="r")[1]
    assert ghosts.pivots(x.T @ x, 9).tolist() == expected.tolist()


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5), (5, 3)])
def test_assignment_is_mostly_the_best_of_all_and_never_far_from_it(rows: int, columns: int) -> None:
    generator, best, n = torch.Generator().manual_seed(0), 0, max(rows, columns)
    for _ in range(20):
        gains = torch.rand(rows, columns, generator=generator).double()
        found = ghosts.assign(gains)
        kept = found[found >= 0]
        assert len(kept) == len(set(kept.tolist())) == min(rows, columns)
        total = float(gains[kept, (found >= 0).nonzero()[:, 0]].sum())
        square = torch.zeros(n, n).double()
        square[:rows, :columns] = gains
        most = max(float(square[list(some), range(n)].sum()) for some in permutations(range(n)))
        best += total > most - 1e-9
        assert total > 0.85 * most
    assert best >= 14


def test_ghost_filters_are_least_squares_on_the_outputs_and_a_ghost_of_a_copy_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 5, 6, 6, generator=generator).double()
    y[:, 3] = F.conv2d(y[:, :1], torch.randn(1, 1, 3, 3, generator=generator).double(), padding=1)[:, 0]
    near = F.unfold(y, 3, padding=1).view(3, 5, 9, 36).permute(0, 3, 1, 2).flatten(0, 1)  # (n, O, 9)
    lags = torch.einsum("nak,nb->akb", near, y.permute(0, 2, 3, 1).flatten(0, 2))
    within = torch.einsum("nak,nal->akl", near, near)
    ((others, sources, filters),) = ghosts.fit_ghosts(lags, within, torch.tensor([0, 1, 2]), [2])
    assert others.tolist() == [3, 4]
    assert sources[0] == 0
    for ghost, source, taps in zip(others, sources, filters, strict=True):
        expected = lstsq(near[:, source], y[:, ghost].flatten())
        torch.testing.assert_close(taps, expected, atol=1e-6, rtol=1e-6)
    assert float((near[:, 0] @ filters[0] - y[:, 3].flatten()).abs().max()) < 1e-6


@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((2, 2), (2, 2))])
def test_lags_of_white_noise_are_those_of_a_very_large_image(
    stride: tuple[int, int], dilation: tuple[int, int]
) -> None:
    conv = nn.Conv2d(2, 3, (3, 2), stride=stride, dilation=dilation, bias=False).double()
    with torch.no_grad():
        conv.weight.normal_(generator=torch.Generator().manual_seed(0))
    spread, place = torch.zeros(1, 2, 33, 33).double(), 16
    # by the response to each pixel: E[y_a(u + d) y_b(u)] is the sum over pixels of both responses
    lags, within = torch.zeros(3, 9, 3).double(), torch.zeros(3, 9, 9).double()
    with torch.no_grad():
        rows, columns = conv(spread).shape[2:]
        centre = (rows // 2, columns // 2)
        near = [(centre[0] + a, centre[1] + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        for channel in range(2):
            for i in range(33):
                for j in range(33):
                    if abs(i - place) > 12 or abs(j - place) > 12:
                        continue
                    spread[0, channel, i, j] = 1
                    y = conv(spread)[0]
                    spread[0, channel, i, j] = 0
                    taps = torch.stack([y[:, r, c] for r, c in near], 1)  # (O, 9)
                    lags += taps[:, :, None] * y[:, centre[0], centre[1]]
                    within += taps[:, :, None] * taps[:, None]
    options = {"stride": stride, "dilation": dilation, "size": 3}
    torch.testing.assert_close(ghosts.white_lags(conv.weight.detach(), **options), lags)
    torch.testing.assert_close(ghosts.white_within(conv.weight.detach(), **options), within)


def test_directions_that_inputs_never_show_keep_their_value() -> None:
    target, x = weight(), patches()
    x[:, 2] = 0  # a dead channel
    start = decoupling.decouple_separable(target, 1)
    pointwise, depthwise = decoupling.fit_separable(target, covariance(x), *start)
    torch.testing.assert_close(pointwise[:, :, 2], start[0][:, :, 2])
    torch.testing.assert_close(depthwise[:, 2], start[1][:, 2])
    assert moved(torch.zeros(2, 2).double(), torch.zeros(2, 1).double()).abs().max() == 0
