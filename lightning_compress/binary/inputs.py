"""Hooks that make layers compute with the signs of their inputs.

    BinaryNet     y = layer(sign(x))                                           Courbariaux et al. 2016
    XNOR-Net      y = K * (layer(sign(x)) - bias) + bias                       Rastegari et al. 2016, equation 11
                  K = box filter over the kernel of (mean over channels of |x|)

The gradient of sign(x) is taken as 1 for |x| <= 1 and as 0 elsewhere; the gradient of K is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.binary.signs import sign_through
from lightning_compress.core.hooks import Removable
from lightning_compress.core.input_hooks import InputHook, InputHooks, NotScriptable, input_hook
from lightning_compress.core.select import is_transposed_linear, is_weight_layer, select_parameters

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ENOUGH = 64  # entries to see before a layer is refused: fewer may all be positive by chance


def input_scales(layer: nn.Module, x: Tensor) -> Tensor:
    """Return XNOR-Net's K: for each output the mean magnitude of its inputs, shaped to multiply the output.

    For a linear layer K is the mean of |x| over the features. For a convolution it is the mean of |x| over the input
    channels of the group, averaged over the kernel's window, padding included.

    Args:
        layer: A linear layer or a convolution that is not transposed.
        x: The input of the layer.

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
    # The layer's own method pads as the layer does; here each group has one input channel and one output channel.
    scales: Tensor = layer._conv_forward(means, kernel / kernel[0].numel(), None)
    return scales if layer.groups == 1 else scales.repeat_interleave(layer.out_channels // layer.groups, channels)


class _FirstLayer(NotScriptable):
    """A hook that records that the network's first layer, which keeps its real inputs, has run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_run = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.has_run = True


class BinaryInput(InputHook):
    """A hook that replaces a layer's input by its signs; with `scale`, a second hook multiplies the output by K.

    Args:
        name: The name of the layer, for messages.
        scale: Whether the output is multiplied by K.
        after: The hook of the layer that must run before this one, or None.
    """

    kind = "sign"

    def __init__(self, name: str = "", *, scale: bool = False, after: _FirstLayer | None = None) -> None:
        self.name = name
        self.scale = scale
        self.after = after
        self.scales: Tensor | None = None
        self._is_on = True
        self._seen = 0
        self._checked = False

    def attach(self, module: nn.Module) -> list[Removable]:
        handles = super().attach(module)
        return [*handles, module.register_forward_hook(self.scale_output, prepend=True)]  # other hooks see the result

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

    def scale_output(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
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
                f"activations=True keeps the inputs of {self.after.name} real, because the module lists it first; but "
                f"{self.name} runs before it. Name the layers whose inputs become signs, as in activations=['...']."
            )
        self.after = None
        self._seen += x.numel()
        self._checked = bool((x < 0).any())
        if not self._checked and self._seen >= _ENOUGH:
            raise ValueError(
                f"The inputs of {self.name} are never negative, as after a ReLU ({self._seen} entries seen; the "
                f"smallest of the last batch is {float(x.detach().min()):.4g}), so all their signs would be +1. Put a "
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
    """Put hooks on layers of a model that replace the layers' inputs by their signs.

    Use it in a training loop of your own, or in a process that loads the trained weights. Hooks of an earlier call are
    replaced.

    Args:
        model: The network.
        activations: True: all targeted layers except the network's first linear layer or convolution, in the order in
            which the model lists its layers. Patterns: the targeted layers that they match.
        target: Patterns of layers; by default every linear layer and convolution.
        exclude: Patterns of layers that keep their real inputs.
        scale: Whether outputs are multiplied by the magnitudes of the inputs, as in XNOR-Net (scaling="mean").
        unused: Names of layers that the network's forward does not use; none of them counts as the first.

    Returns:
        The hooks; `remove()` takes them off.

    Raises:
        ValueError: XNOR-Net has no scaling for a layer, or `activations` matches a layer that is not targeted. Later,
            in a forward pass in training mode: a layer's inputs are never negative, or a layer runs before the one that
            the model lists first.

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
    after, handles = None, list[Removable]()
    if first:
        after = _FirstLayer(first)
        handles.append(model.get_submodule(first).register_forward_pre_hook(after))
    for name in names:
        layer = model.get_submodule(name)
        handles += BinaryInput(name, scale=scale, after=after).attach(layer)
    return InputHooks(names, handles)


def check_scalable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a ValueError if XNOR-Net has no scaling of inputs for one of the layers."""
    for name in names:
        layer = model.get_submodule(name)
        if not (isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) or is_transposed_linear(layer)):
            raise ValueError(
                f"{name} is a {type(layer).__name__}, for which XNOR-Net has no scaling of inputs, as activations with "
                f"scaling='mean' need it. Exclude the layer, or use scaling='none'."
            )


def _choose(
    model: nn.Module,
    activations: bool | str | Sequence[str],
    targeted: Mapping[str, nn.Parameter],
    unused: Collection[str],
) -> tuple[list[str], str]:
    """Return the names of the layers that get signs as inputs, and of the layer that must run before them, or ""."""
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
            f"activations={activations!r} matches {', '.join(strange)}, whose weights are not binary: add these layers "
            f"to target, or take them out of activations."
        )
    return [name for name in mine if id(layers[name].weight) in chosen], ""


def layers_with_signs(
    model: nn.Module,
    activations: bool | str | Sequence[str],
    targeted: Mapping[str, nn.Parameter],
    unused: Collection[str] = (),
) -> list[str]:
    """Return the names of the layers with targeted weights on which `binarize_inputs` puts hooks."""
    return _choose(model, activations, targeted, unused)[0]


def has_binary_inputs(layer: nn.Module) -> bool:
    """Return whether `binarize_inputs` has put hooks on this layer."""
    return isinstance(input_hook(layer), BinaryInput)
