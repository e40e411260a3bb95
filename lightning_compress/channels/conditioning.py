"""Trial weights with which a network is well conditioned, so that every difference is either tiny or an error.

Random weights can make a deep network chaotic: a product of two branches grows from block to block, and a sine of
thirty times its input multiplies every rounding error by thirty. Then weights are scaled, layer by layer, until the
outputs of all layers have one size: the largest one with which a tiny change of the weights changes the output little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.hooks import hooked
from lightning_compress.core.outputs import run

_TINY = 1e-13  # relative change of the weights; rounding is a thousandth of it
_SENSITIVE = 1e3  # the output's relative change may be so many times larger; in ordinary networks it is 1 to 5 times
_SIZES = tuple(
    2.0**-step for step in range(10)
)  # of all layers' outputs; the smaller they are, the less a softmax changes


def conditioned(model: nn.Module, example_inputs: ExampleInputs, outputs: Sequence[Tensor]) -> dict[str, float]:
    """Scale the model's parameters until it is well conditioned.

    If no size suffices, the best one is taken, and trials then freeze the groups whose comparison fails.

    Args:
        model: The network, in the sandbox.
        example_inputs: The inputs of trials.
        outputs: The network's outputs for them before any scaling.

    Returns:
        By name the factor of every parameter that was scaled; empty for a network that was well conditioned.
    """
    if _sensitivity(model, example_inputs, outputs) <= _SENSITIVE:
        return {}
    found: list[tuple[float, dict[str, float]]] = []
    for size in _SIZES:
        factors = _factors(model, example_inputs, size)
        with_factors(model, factors)
        found.append((_sensitivity(model, example_inputs, run(model, example_inputs)), factors))
        if found[-1][0] <= _SENSITIVE:
            return factors
        with_factors(model, {name: 1 / factor for name, factor in factors.items()})
    _, factors = min(found, key=lambda one: one[0])
    with_factors(model, factors)
    return factors


def with_factors(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiply parameters by factors."""
    for name, factor in factors.items():
        model.get_parameter(name).data *= factor


def _sensitivity(model: nn.Module, example_inputs: ExampleInputs, before: Sequence[Tensor]) -> float:
    """Return the ratio of the output's relative change to that of the weights."""
    generator = torch.Generator().manual_seed(1)
    with ExitStack() as back:
        for data in (one.data for one in model.parameters() if one.is_floating_point()):
            each = torch.randn([*data.shape[:1], *[1] * (data.dim() - 1)], generator=generator, dtype=torch.float64)
            factors = (1 + _TINY * each).to(data.device)
            data.mul_(factors)
            back.callback(data.div_, factors)  # restores it up to rounding, without the memory of a copy
        after = run(model, example_inputs)
    ratios = []
    for one, other in zip(before, after, strict=True):
        if not one.is_floating_point() or one.shape != other.shape:
            continue
        numbers = one.isfinite() & other.isfinite()
        if bool((numbers & (one != 0)).any()):
            ratios.append(float((one - other)[numbers].abs().max() / one[numbers].abs().max()) / _TINY)
    return max(ratios, default=0.0)


def _factors(model: nn.Module, example_inputs: ExampleInputs, size: float) -> dict[str, float]:
    """Return by parameter the factor that gives its layer's output this size, given that all layers before have it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    factors: dict[str, float] = {}

    def scale(module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        length = float(output.square().mean().sqrt())
        if length == 0 or not math.isfinite(length):
            return None
        mine = [names[id(one)] for one in module._parameters.values() if one is not None and one.is_floating_point()]
        if any(name in factors for name in mine):  # the layer was called before, or its weights are tied
            return None
        factors.update(dict.fromkeys(mine, size / length))
        return output * (size / length)

    layers = [module for module in model.modules() if module._parameters and not any(True for _ in module.children())]
    handles = [layer.register_forward_hook(scale) for layer in layers]
    with hooked(*handles):
        run(model, example_inputs)
    return factors
