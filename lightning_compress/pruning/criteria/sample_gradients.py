"""Computes the gradient of every single sample from a layer's input and the gradient at its output.

A linear layer or a convolution computes y = W x + b at every position p, so that sample n's gradient is

    d L_n / d W = sum_p delta_np x_np^T        d L_n / d b = sum_p delta_np        delta = d L / d y

and one backward pass over a batch yields all of them, as long as rows do not mix: L = sum_n L_n, sample n in row n.
(Batch norm in training mode mixes rows; sample n's gradient is then that of the whole loss through row n.)

Shape suffixes: B samples, P positions, I inputs, O output channels, S spatial dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.precision import widened

Layer: TypeAlias = nn.Linear | _ConvNd

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_CONV_WEIGHT: dict[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}

# The gradients of as many samples exist at one time as hold this many numbers (64 MB in float32), but at least one's.
_CHUNK_NUMBERS = 2**24


def channels(layer: Layer, y: Tensor) -> Tensor:
    """View a layer's output, or the gradient at its output, as (B, O, P)."""
    if isinstance(layer, nn.Linear):
        return y.reshape(y.shape[0], -1, y.shape[-1]).transpose(1, 2)
    return y.flatten(2)


def weight_gradients(layer: Layer, x: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of every sample with respect to the weight: (B, *weight.shape).

    Args:
        layer: Linear, Conv1d..3d or ConvTranspose1d..3d, with any stride, padding, dilation and groups.
        x: The layer's input, samples in dimension 0.
        delta: The gradient at the layer's output.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> weight_gradients(layer, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [10.0]])).flatten(1)
        tensor([[ 1.,  2.],
                [30., 40.]])
    """
    if isinstance(layer, nn.Linear):
        x_BPI = x.reshape(x.shape[0], -1, x.shape[-1])
        return channels(layer, delta) @ x_BPI
    if layer.transposed:
        # <convT(x, W), delta> = <x, conv(delta, W)>: the same gradient with the roles of x and delta exchanged.
        x, delta = _reached(layer, F.pad(delta, _padding(layer)), x.shape[2:]), x
    else:
        x = F.pad(x, _padding(layer), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    conv_weight = _CONV_WEIGHT[len(layer.kernel_size)]

    def one(x_IS: Tensor, delta_OS: Tensor) -> Tensor:
        size = layer.weight.shape
        return conv_weight(x_IS[None], size, delta_OS[None], layer.stride, 0, layer.dilation, layer.groups)

    gradients: Tensor = torch.func.vmap(one)(x, delta)
    return gradients


def bias_gradients(layer: Layer, x: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of every sample with respect to the bias: (B, O)."""
    return channels(layer, delta).sum(2)


def _padding(layer: _ConvNd) -> list[int]:
    """Return the layer's padding in the form of `F.pad`: (before, after) of every dimension, the last one first."""
    if layer.padding == "valid":
        pairs = [(0, 0) for _ in layer.kernel_size]
    elif layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(p, p) for p in layer.padding if isinstance(p, int)]
    return list(itertools.chain.from_iterable(reversed(pairs)))


def _reached(layer: _ConvNd, y: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cut off the far end of a transposed convolution's output that no input reaches (`output_padding`)."""
    geometry = zip(sizes, layer.stride, layer.dilation, layer.kernel_size, strict=True)
    for dim, (size, stride, dilation, kernel) in enumerate(geometry, start=2):
        y = y.narrow(dim, 0, (size - 1) * stride + dilation * (kernel - 1) + 1)
    return y


_GRADIENTS = {"weight": weight_gradients, "bias": bias_gradients}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer after a backward pass: its input, and the gradient at its output.

    `product` is W x, the output without the bias, as (B, O, P), if the caller asked for it.
    """

    layer: Layer
    x: Tensor
    delta: Tensor
    product: Tensor | None

    def gradients(self, kind: str, rows: slice) -> Tensor:
        """Return the gradients of the samples `rows` by the layer's "weight" or "bias", in float32 or wider."""
        return _GRADIENTS[kind](self.layer, widened(self.x[rows]), widened(self.delta[rows]))


class _Forward(NamedTuple):
    """One call of a layer before a backward pass: the parts of a `Call`, and the edge that gets its gradient."""

    layer: Layer
    x: Tensor
    product: Tensor | None
    edge: GradientEdge
    shape: torch.Size


def _edge(output: Tensor) -> GradientEdge:
    """Return the output's edge in the graph, which in-place operations on the output do not change.

    A linear layer at positions returns a view, and an in-place operation on a view enters the graph at its base.
    """
    return get_gradient_edge(output if output._base is None else output._base)


class SampleGradients:
    """Watches the layers that own some parameters, and computes every sample's gradient from their calls.

    Args:
        model: The network.
        names: Qualified names of weights and biases of linear layers and (transposed) convolutions.
        criterion: The criterion's name, for error messages.
        keep_products: Whether W x of every call is kept as well, for `channel_products`.

    Raises:
        ValueError: A parameter belongs to any other kind of layer.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, criterion: str, keep_products: bool = False) -> None:
        self.criterion = criterion
        self.keep_products = keep_products
        self.layer_names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self.owners = {name: _owners(model, name, criterion) for name in names}
        self.calls: list[_Forward] = []

    def watch(self) -> list[RemovableHandle]:
        """Put hooks on the layers, and return them; the caller removes them."""
        layers = dict.fromkeys(layer for owners in self.owners.values() for layer, _ in owners)
        # These hooks run before all others, of which one may replace the output.
        return [layer.register_forward_hook(self._record, prepend=True, with_kwargs=True) for layer in layers]

    def clear(self) -> None:
        """Forget the calls, so that their graph is freed."""
        self.calls.clear()

    def _record(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        x: Tensor = args[0] if args else kwargs["input"]
        product = None
        if self.keep_products:
            y_BOP = channels(layer, output.detach())
            # It is always a copy, because the output may be overwritten in place.
            product = y_BOP.clone() if layer.bias is None else y_BOP - layer.bias.detach()[:, None]
        self.calls.append(_Forward(layer, x.detach(), product, _edge(output), output.shape))

    def backward(self, objective: Tensor, *, rows: int | None = None) -> list[Call]:
        """Find the calls that `objective` depends on, and the gradients at their outputs.

        It takes one extra pass through the graph, which stays intact for the ordinary pass. The extra pass does not
        reach the parameters, so that `.grad` and the reducer of DistributedDataParallel are unaffected.

        Args:
            objective: A sum over samples.
            rows: The number of samples; None takes that of the first layer's input.

        Raises:
            ValueError: A layer's input has another number of rows.
        """
        if not self.calls:
            return []
        forwards = tuple(self.calls)  # activation checkpointing calls the layers again during the pass
        edges = [forward.edge for forward in forwards]
        deltas = torch.autograd.grad(objective, edges, retain_graph=True, allow_unused=True)
        calls = [
            Call(forward.layer, forward.x, delta.reshape(forward.shape), forward.product)
            for forward, delta in zip(forwards, deltas, strict=True)
            if delta is not None
        ]
        for call in calls:
            self._check_rows(call, len(calls[0].x) if rows is None else rows)
        return calls

    def _check_rows(self, call: Call, rows: int) -> None:
        batched = 2 if isinstance(call.layer, nn.Linear) else 2 + len(call.layer.kernel_size)
        if call.x.dim() < batched or len(call.x) != rows:
            raise ValueError(
                f"criterion={self.criterion!r} needs one row per sample in dimension 0 of every layer's input, but "
                f"with {rows} samples {self.layer_names[call.layer]!r} was given shape {tuple(call.x.shape)}: exclude "
                "it, or choose a criterion that looks at no single sample (magnitude, l2, random, taylor, obd, si)."
            )

    def sums(self, calls: Sequence[Call], power: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Sum power(g_n) over the samples n, for every parameter, in float32 or wider.

        Args:
            calls: The calls that `backward` returned. The gradients of several calls of one parameter (a layer called
                twice, tied weights) are added within a sample before `power` is taken.
            power: `torch.square` or `torch.abs`, for which power(a b) = power(a) power(b).
        """
        return {name: _sum(seen, power) for name in self.owners if (seen := self._calls_of(name, calls))}

    def channel_products(self, calls: Sequence[Call]) -> dict[str, Tensor]:
        """Sum g_n w over each output channel's weights, for every sample: (B, O) per weight.

        sum_i g_n[c, i] w[c, i] = sum_p delta_np[c] sum_i x_np[i] w[c, i] = sum_p delta_np[c] (W x_np)[c]: no gradient
        is formed.
        """
        products: dict[str, Tensor] = {}
        for name in self.owners:
            for call, _ in self._calls_of(name, calls):
                assert call.product is not None, "made with keep_products=False"
                product_BO = (widened(channels(call.layer, call.delta)) * call.product).sum(2)
                products[name] = products[name] + product_BO if name in products else product_BO
        return products

    def _calls_of(self, name: str, calls: Sequence[Call]) -> list[tuple[Call, str]]:
        return [(call, kind) for call in calls for layer, kind in self.owners[name] if layer is call.layer]


def _sum(calls: Sequence[tuple[Call, str]], power: Callable[[Tensor], Tensor]) -> Tensor:
    (first, kind), *others = calls
    if not others and kind == "weight" and isinstance(first.layer, nn.Linear) and first.x.dim() == 2:
        # g_n = delta_n x_n^T is of rank one, and so is its power.
        return power(widened(first.delta)).T @ power(widened(first.x))
    total = torch.zeros_like(widened(getattr(first.layer, kind).detach()))
    step = max(1, _CHUNK_NUMBERS // total.numel())
    for start in range(0, len(first.x), step):
        rows = slice(start, start + step)
        gradients = first.gradients(kind, rows)
        for call, kind_there in others:
            gradients = gradients + call.gradients(kind_there, rows)
        total += power(gradients).sum(0)
    return total


def _owners(model: nn.Module, name: str, criterion: str) -> list[tuple[Layer, str]]:
    """Return every layer that holds the parameter, as its "weight" or "bias"; a tied parameter has several."""
    parameter = model.get_parameter(name)
    owners: list[tuple[Layer, str]] = []
    for module_name, module in model.named_modules():
        for kind, candidate in module.named_parameters(recurse=False, remove_duplicate=False):
            if candidate is not parameter:
                continue
            if not (isinstance(module, _LAYERS) and _is_plain(module)):
                raise ValueError(
                    f"criterion={criterion!r} needs the gradient of every single sample, which is known for Linear, "
                    f"Conv1d..3d and ConvTranspose1d..3d, but {name!r} belongs to {module_name!r}, a "
                    f"{type(module).__name__}: exclude it, or choose a criterion that looks at no single sample "
                    "(magnitude, l2, random, taylor, obd, si)."
                )
            owners.append((module, kind))
    return owners


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer computes its output as torch's own class does; a subclass may not."""
    base = next(base for base in _LAYERS if isinstance(layer, base))
    return all(
        getattr(type(layer), method, None) is getattr(base, method, None) for method in ("forward", "_conv_forward")
    )
