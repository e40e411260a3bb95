"""Hooks on the user's own modules, by which layers compute with the signs of their inputs.

    BinaryNet     y = layer(sign(x))                                           Courbariaux et al. 2016
    XNOR-Net      y = K * (layer(sign(x)) - bias) + bias                       Rastegari et al. 2016, equation 11
                  K = box filter over the kernel of (mean over channels of |x|)

The gradient of sign(x) is taken as 1 for |x| <= 1 and as 0 elsewhere; that of K is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.binary.signs import sign_through
from lightning_compress.core.input_hooks import InputHook, InputHooks, NotScriptable, input_hook
from lightning_compress.core.select import is_transposed_linear, is_weight_layer, select_parameters
from lightning_compress.core.structure import Removable

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ENOUGH = 64  # entries; a smaller input may have no negative one by chance


def input_scales(layer: nn.Module, x: Tensor) -> Tensor:
    """Return XNOR-Net's K, which stands for the magnitude of the inputs of every output, shaped to multiply the output.

    Args:
        layer: A linear layer: the mean of |x| over the features. A convolution: the mean of |x| over the input channels
            (of the group), averaged over the kernel's window, the padding included.
        x: Its input.

    Example:
        >>> x = torch.tensor([[1.0, -3.0], [0.0, 1.0]])
        >>> input_scales(nn.Linear(2, 5), x)
        tensor([[2.0000],
                [0.5000]])
        >>> input_scales(nn.Conv1d(2, 4, 2), x).flatten()  # |x| has the means 0.5 and 2.0 over its two channels
        tensor([1.2500])
    """
    if isinstance(layer, nn.Linear) or is_transposed_linear(layer):
        return x.abs().mean(-1, keepdim=True)
    assert isinstance(layer, _CONVOLUTIONS)
    channels = -len(layer.kernel_size) - 1
    means: Tensor = x.abs().unflatten(channels, (layer.groups, -1)).mean(channels)  # type: ignore[no-untyped-call]
    kernel = torch.ones((layer.groups, 1, *layer.kernel_size), dtype=means.dtype, device=means.device)
    # The layer's own way of padding, with one input and one output channel in each of its groups.
    scales: Tensor = layer._conv_forward(means, kernel / kernel[0].numel(), None)
    return scales if layer.groups == 1 else scales.repeat_interleave(layer.out_channels // layer.groups, channels)


class _Order(NotScriptable):
    """Remembers that the layer that sees the network's own input has run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_run = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.has_run = True


class BinaryInput(InputHook):
    """The hook before a layer: signs instead of inputs. The hook after it multiplies with K."""

    kind = "sign"

    def __init__(self, name: str = "", *, scale: bool = False, after: _Order | None = None) -> None:
        self.name = name
        self.scale = scale
        self.after = after
        self.scales: Tensor | None = None
        self._is_on = True
        self._seen = 0
        self._checked = False

    def attach(self, module: nn.Module) -> list[Removable]:
        handles = super().attach(module)
        return [*handles, module.register_forward_hook(self.behind, prepend=True)]  # before those that look at outputs

    def record(self) -> dict[str, Any] | None:
        return {"scale": self.scale} if self._is_on else None

    def take(self, record: Mapping[str, Any] | None) -> None:
        self._is_on = record is not None
        self.scale = record is not None and bool(record["scale"])

    def change(self, layer: nn.Module, x: Tensor) -> Tensor:
        if not self._is_on:
            return x
        if layer.training and not self._checked:
            self._check(x)
        if self.scale:
            self.scales = input_scales(layer, x)
        return sign_through(x)

    def behind(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        scales, self.scales = self.scales, None
        if scales is None:
            return output
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        if bias is None:
            return output * scales.to(output.dtype)
        if isinstance(layer, _CONVOLUTIONS):
            bias = bias.view(-1, *[1] * len(layer.kernel_size))
        bias = bias.to(output.dtype)
        return (output - bias) * scales.to(output.dtype) + bias

    def _check(self, x: Tensor) -> None:
        if self.after is not None and not self.after.has_run:
            raise ValueError(
                f"{self.name} runs before {self.after.name}, which the module lists first and which would therefore "
                f"keep its real inputs: name the layers whose inputs become signs, as in activations=['...']."
            )
        self.after = None
        self._seen += x.numel()
        self._checked = bool((x < 0).any())
        if not self._checked and self._seen >= _ENOUGH:
            raise ValueError(
                f"The inputs of {self.name} are never negative (smallest of the first {self._seen}: "
                f"{float(x.detach().min()):.4g}), as they are after a ReLU, so that all their signs would be +1. Put a "
                f"batch norm, or a hardtanh instead of the ReLU, before {self.name}, or exclude it."
            )


def binarize_inputs(
    model: nn.Module,
    *,
    activations: bool | str | Sequence[str] = True,
    target: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    scale: bool = False,
    unused: Collection[str] = (),
) -> InputHooks:
    """Let layers of a model see the signs of their inputs, by hooks: in training, and in a process that loads it.

    A layer that sees them already gets new hooks in the place of the old ones.

    Args:
        model: The network.
        activations: True for all targeted layers but the network's first linear layer or convolution, in the order in
            which the model lists them; patterns for those of them that they name.
        target: Patterns of layers; by default every linear layer and convolution.
        exclude: Patterns to leave out.
        scale: Whether outputs are multiplied with the inputs' magnitudes, as in XNOR-Net (scaling="mean").
        unused: Names of layers that the network's forward does not use, of which none is the first.

    Raises:
        ValueError: A layer has no binary form. Later, in a forward pass in training mode: inputs are never negative, or
            the network's first layer is not the one that the model lists first.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> inputs = binarize_inputs(net)
        >>> inputs.names
        ['1']
        >>> hidden = net[0](torch.randn(4, 2))
        >>> torch.equal(net[1](hidden), nn.functional.linear(hidden.sign(), net[1].weight, net[1].bias))
        True
        >>> inputs.remove()
    """
    names, first = _choose(model, activations, select_parameters(model, target, exclude=exclude), unused)
    if scale:
        check_scalable(model, names)
    order, handles = None, list[Removable]()
    if first:
        order = _Order(first)
        handles.append(model.get_submodule(first).register_forward_pre_hook(order))
    for name in names:
        layer = model.get_submodule(name)
        handles += BinaryInput(name, scale=scale, after=order).attach(layer)
    return InputHooks(names, handles)


def check_scalable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a ValueError for a layer whose inputs' magnitudes have no form that multiplies its outputs."""
    for name in names:
        layer = model.get_submodule(name)
        if not (isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) or is_transposed_linear(layer)):
            raise ValueError(
                f"activations with scaling='mean': {name} is a {type(layer).__name__}, for which XNOR-Net has no "
                f"scaling of inputs. Exclude it, or use scaling='none'."
            )


def _choose(
    model: nn.Module,
    activations: bool | str | Sequence[str],
    targeted: Mapping[str, nn.Parameter],
    unused: Collection[str],
) -> tuple[list[str], str]:
    """Return the layers that see signs, and the one that must run before them, "" for none."""
    layers = {name: layer for name, layer in model.named_modules() if is_weight_layer(layer)}
    weights = {id(parameter) for parameter in targeted.values()}
    mine = [name for name, layer in layers.items() if id(layer.weight) in weights]
    if activations is False or not mine:
        return [], ""
    if activations is True:
        first = next(name for name in layers if name not in unused)
        return [name for name in mine if name != first], first
    chosen = {id(parameter) for parameter in select_parameters(model, activations, argument="activations").values()}
    if strange := [name for name, layer in layers.items() if id(layer.weight) in chosen - weights]:
        raise ValueError(
            f"activations={activations!r} names {', '.join(strange)}, whose weights are not binary: add them to "
            f"target, or name fewer."
        )
    return [name for name in mine if id(layers[name].weight) in chosen], ""


def layers_with_signs(
    model: nn.Module,
    activations: bool | str | Sequence[str],
    targeted: Mapping[str, nn.Parameter],
    unused: Collection[str] = (),
) -> list[str]:
    """Return the layers that `binarize_inputs` puts hooks on, of those that have the targeted weights."""
    return _choose(model, activations, targeted, unused)[0]


def has_binary_inputs(layer: nn.Module) -> bool:
    """Whether `binarize_inputs` has hooks on this layer."""
    return isinstance(input_hook(layer), BinaryInput)
