"""The values with which the parts of a block begin: fitted to a layer's weight, and to its inputs if they are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.conv_substitution import decoupling, ghosts, shuffled, squeezed
from lightning_compress.conv_substitution.blocks import GHOST_SIZE, Ghost, Numbers
from lightning_compress.conv_substitution.least_squares import white
from lightning_compress.replacement.layer import LinearMap


@dataclass(frozen=True)
class Seen:
    """What a layer reads and returns, as far as a fit needs it, in float64.

    Attributes:
        covariance: Of the patches that its kernel sees: (I, K, I, K); of second moments where `mean` is zero.
        mean: Of these patches: (I, K).
        lags: For ghosts: of each output's neighbourhood with every output, (O, D ** dims, O).
        within: For ghosts: of each output's neighbourhood, (O, D ** dims, D ** dims).
        near: For ghosts: the mean of each output's neighbourhood, (O, D ** dims).
    """

    covariance: Tensor
    mean: Tensor
    lags: Tensor | None = None
    within: Tensor | None = None
    near: Tensor | None = None


def white_noise(layer: LinearMap, block: str) -> Seen:
    """Return what a layer would see if its inputs were white noise: then only its weight counts."""
    weight = layer.weight.double()
    seen = Seen(white(weight.flatten(2)), weight.new_zeros(weight[0].flatten(1).shape))
    if block != "ghost":
        return seen
    lagged = {"stride": layer.stride, "dilation": layer.dilation, "size": GHOST_SIZE}
    return replace(
        seen,
        lags=ghosts.white_lags(weight, **lagged),  # type: ignore[arg-type]
        within=ghosts.white_within(weight, **lagged),  # type: ignore[arg-type]
        near=_constant(layer).double()[:, None].expand(-1, GHOST_SIZE ** len(layer.stride)),
    )


def _constant(layer: LinearMap) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


def values(layer: LinearMap, block: str, numbers: Numbers, seen: Seen) -> dict[str, Tensor]:
    """Return the parts' parameters, and buffers, by name, in float64.

    Args:
        layer: The convolution.
        block: The name of the form.
        numbers: The form's numbers.
        seen: What the layer sees.
    """
    weight = layer.weight.double().flatten(2)
    fit = {"separable": _separable, "xception": _xception, "fire": _fire, "shuffle": _shuffle, "ghost": _ghost}[block]
    return fit(layer, weight, numbers, seen)


def _bias(layer: LinearMap, weight: Tensor, approximation: Tensor, seen: Seen) -> Tensor | None:
    """Return the bias with which the mean output is that of the layer."""
    if layer.bias is None:
        return None
    return layer.bias.double() + ((weight - approximation) * seen.mean).sum((1, 2))


def _with(found: dict[str, Tensor], name: str, bias: Tensor | None) -> dict[str, Tensor]:
    return found if bias is None else found | {f"{name}.bias": bias}


def _kernels(layer: LinearMap, filters: Tensor) -> Tensor:
    """Return taps (..., n, K) as the kernels of a depthwise convolution."""
    return torch.unflatten(filters, -1, layer.weight.shape[2:])[:, None]


def _point(layer: LinearMap, matrix: Tensor) -> Tensor:
    return matrix.view(*matrix.shape, *[1] * len(layer.stride))


def _separable(layer: LinearMap, weight: Tensor, numbers: Numbers, seen: Seen) -> dict[str, Tensor]:
    start = decoupling.decouple_separable(weight, numbers["terms"])
    pointwise, depthwise = decoupling.fit_separable(weight, seen.covariance, *start)
    bias = _bias(layer, weight, decoupling.separable_weight(pointwise, depthwise), seen)
    found = {f"depthwise{t + 1 if t else ''}.weight": _kernels(layer, one) for t, one in enumerate(depthwise)}
    return _with(found | {"pointwise.weight": _point(layer, pointwise.flatten(1))}, "pointwise", bias)


def _xception(layer: LinearMap, weight: Tensor, numbers: Numbers, seen: Seen) -> dict[str, Tensor]:
    start = decoupling.decouple_xception(weight, numbers["terms"])
    pointwise, depthwise = decoupling.fit_xception(weight, seen.covariance, *start)
    bias = _bias(layer, weight, decoupling.xception_weight(pointwise, depthwise), seen)
    found = {f"depthwise{t + 1 if t else ''}.weight": _kernels(layer, one) for t, one in enumerate(depthwise)}
    return _with(found | {"pointwise.weight": _point(layer, pointwise.flatten(0, 1))}, "depthwise", bias)


def _shuffle(layer: LinearMap, weight: Tensor, numbers: Numbers, seen: Seen) -> dict[str, Tensor]:
    hidden, groups = numbers["hidden"], numbers["groups"]
    start = shuffled.start_shuffle(weight, hidden, groups)
    first, filters, last = shuffled.fit_shuffle(weight, seen.covariance, start)
    bias = _bias(layer, weight, shuffled.shuffle_weight(first, filters, last), seen)
    dealt = torch.arange(hidden, device=first.device).view(groups, -1).T.flatten()
    before = torch.empty_like(first)
    before[dealt] = first
    found = {
        "first.weight": _point(layer, before),
        "depthwise.weight": _kernels(layer, filters),
        "last.weight": _point(layer, last),
    }
    return _with(found, "last", bias)


def _fire(layer: LinearMap, weight: Tensor, numbers: Numbers, seen: Seen) -> dict[str, Tensor]:
    start = squeezed.start_squeeze(weight, numbers["squeeze"])
    squeeze, expand, chosen = squeezed.fit_fire(weight, seen.covariance, start, len(weight) // 2)
    others = _without(chosen, len(weight))
    bias = _bias(layer, weight, squeezed.fire_weight(squeeze, expand), seen)
    found = {
        "squeeze.weight": _point(layer, squeeze),
        "expand1.weight": _point(layer, expand[chosen][:, :, expand.shape[2] // 2]),
        "expand.weight": torch.unflatten(expand[others], -1, layer.weight.shape[2:]),
        "order.index": torch.cat([chosen, others]).argsort(),
    }
    if bias is not None:
        found |= {"expand1.bias": bias[chosen], "expand.bias": bias[others]}
    return found


def _ghost(layer: LinearMap, weight: Tensor, numbers: Numbers, seen: Seen) -> dict[str, Tensor]:
    assert seen.lags is not None
    assert seen.within is not None
    assert seen.near is not None
    centre, rounds = seen.lags.shape[1] // 2, Ghost.ghosts(layer.sizes, numbers)
    chosen = ghosts.pivots(seen.lags[:, centre], len(weight) - sum(rounds))
    made = ghosts.fit_ghosts(seen.lags, seen.within, chosen, rounds)
    # the last of the small convolutions may read only the first ones of the computed outputs
    used = made[-1][1]
    first = torch.cat([used, _without(used, len(chosen))])
    place, chosen, order = first.argsort(), chosen[first], [chosen[first]]
    found = {"primary.weight": layer.weight.double()[chosen]}
    if layer.bias is not None:
        found["primary.bias"] = layer.bias.double()[chosen]
    for t, (others, sources, filters) in enumerate(made):
        by_place = place[sources].argsort()
        others, taps = others[by_place], filters[by_place]
        name = f"cheap{t + 1 if t else ''}"
        found[f"{name}.weight"] = torch.unflatten(taps, -1, [GHOST_SIZE] * len(layer.stride))[:, None]
        if layer.bias is not None:
            found[f"{name}.bias"] = seen.near[others, centre] - (taps * seen.near[chosen[: len(others)]]).sum(1)
        order.append(others)
    return found | {"order.index": torch.cat(order).argsort()}


def _without(chosen: Tensor, n: int) -> Tensor:
    free = torch.ones(n, dtype=torch.bool, device=chosen.device)
    free[chosen] = False
    return free.nonzero()[:, 0]
