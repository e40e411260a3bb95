"""What a layer computes as a linear map, whatever its class, and why another layer can't be seen as one."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.core.records import RecordError, shown

Kind = Literal["linear", "conv", "embedding"]
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BASES: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.Linear, "linear"),
    *((conv, "conv") for conv in CONVS.values()),
    (nn.Embedding, "embedding"),
)
_MODES = ("zeros", "reflect", "replicate", "circular")
_CPU = torch.device("cpu")
_MOST = 1 << 31  # a size, in a record


class UnreplaceableError(ValueError):
    """A layer is no linear map that another module could compute; the message has the reason in words."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of a layer, of which another module that takes its place is built.

    Attributes:
        kind: "linear", "conv" or "embedding".
        shape: Of its weight, as in `LinearMap`.
        bias: Whether it has one.
        stride: Of a convolution, as the next ones; () for others.
        padding: Zeros, or what `padding_mode` says, on each side.
        dilation: The distance of neighbours in the kernel.
        groups: In how many parts the channels are convolved apart; 1 for others.
        padding_mode: As for torch's convolutions.
        padding_idx: Of an embedding: the entry that is never trained.
        dtype: Of its weight.
        device: Of its weight.
    """

    kind: Kind
    shape: tuple[int, ...]
    bias: bool
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    padding_idx: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU

    @property
    def inputs(self) -> int:
        """The number of features or channels that it reads; of an embedding, that of its entries."""
        return self.shape[0] if self.kind == "embedding" else self.shape[1] * self.groups

    @property
    def outputs(self) -> int:
        """The number of features or channels that it returns."""
        return self.shape[1] if self.kind == "embedding" else self.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of a convolution's kernel; () for others."""
        return self.shape[2:]

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return math.prod(self.shape) + (self.outputs if self.bias else 0)

    def record(self) -> dict[str, Any]:
        """Return it as plain values, without type and device."""
        return {name: list(one) if isinstance(one, tuple) else one for name, one in self._plain().items()}

    def _plain(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("dtype", "device")}

    def same(self, other: LayerShape) -> bool:
        """Return whether two layers have the same sizes, whatever their type and device."""
        return self._plain() == other._plain()

    @classmethod
    def of_record(cls, record: Any, *, dtype: torch.dtype, device: torch.device) -> LayerShape:
        """Return what `record` has made plain.

        Raises:
            RecordError: No layer has such sizes.
        """
        names = set(cls.__dataclass_fields__) - {"dtype", "device"}
        if not isinstance(record, Mapping) or set(record) != names:
            raise RecordError(f"The record of a layer that was replaced has the sizes {shown(record)}.")
        dims = len(record["shape"]) - 2 if isinstance(record["shape"], list | tuple) else 0
        dims = dims if record["kind"] == "conv" else 0
        good = (
            record["kind"] in get_args(Kind)
            and _numbers(record["shape"], dims + 2, 1)
            and (dims in CONVS or record["kind"] != "conv")
            and isinstance(record["bias"], bool)
            and not (record["bias"] and record["kind"] == "embedding")
            and all(_numbers(record[name], dims, low) for name, low in _KERNELS.items())
            and type(record["groups"]) is int
            and 0 < record["groups"] <= record["shape"][0]
            and record["shape"][0] % record["groups"] == 0
            and (record["kind"] == "conv" or record["groups"] == 1)
            and record["padding_mode"] in _MODES
            and (record["padding_idx"] is None or _is_entry(record))
        )
        if not good:
            raise RecordError(f"The record of a layer that was replaced has the sizes {shown(dict(record))}.")
        plain: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in record.items()}
        return cls(**plain, dtype=dtype, device=device)


_KERNELS = {"stride": 1, "padding": 0, "dilation": 1}  # with their least values


def _numbers(given: Any, length: int, least: int) -> bool:
    fits = isinstance(given, list | tuple) and len(given) == length
    return fits and all(type(one) is int and least <= one < _MOST for one in given)


def _is_entry(record: Mapping[str, Any]) -> bool:
    place = record["padding_idx"]
    return record["kind"] == "embedding" and type(place) is int and 0 <= place < record["shape"][0]


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """What a layer computes: a linear map of its input, or of each patch that a kernel sees, plus a bias.

    Attributes:
        kind: "linear", "conv" or "embedding".
        weight: (outputs, inputs) of a linear layer, also of transformers' `Conv1D`, whose own is transposed;
            (outputs, inputs / groups, *kernel) of a convolution; (entries, width) of an embedding. Detached; it may
            share the memory of the layer's own.
        bias: (outputs,), or None.
        stride: Of a convolution, as the next ones; () for others.
        padding: Zeros, or what `padding_mode` says, on each side, in numbers.
        dilation: The distance of neighbours in the kernel.
        groups: In how many parts the channels are convolved apart; 1 for others.
        padding_mode: As for torch's convolutions.
        padding_idx: Of an embedding: the entry that is never trained.
    """

    kind: Kind
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    padding_idx: int | None = None

    @property
    def sizes(self) -> LayerShape:
        """Its sizes, without values."""
        return LayerShape(
            kind=self.kind,
            shape=tuple(self.weight.shape),
            bias=self.bias is not None,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            padding_idx=self.padding_idx,
            dtype=self.weight.dtype,
            device=self.weight.device,
        )


def linear_map(layer: nn.Module) -> LinearMap:
    """Return what a layer computes.

    Raises:
        UnreplaceableError: It is no linear layer, convolution or embedding, or not only that.

    Example:
        >>> found = linear_map(nn.Conv2d(4, 8, 3, padding="same", bias=False))
        >>> found.kind, found.weight.shape, found.padding, found.bias
        ('conv', torch.Size([8, 4, 3, 3]), (1, 1), None)
    """
    base, kind = _class_of(layer)
    own, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert own is not None
    weight = own.detach()
    if base.__name__ == "Conv1D":
        weight = weight.t()
    more: dict[str, Any] = {}
    if kind == "conv":
        assert isinstance(layer, nn.modules.conv._ConvNd)
        more = {
            "stride": tuple(layer.stride),
            "padding": _padding(layer),
            "dilation": tuple(layer.dilation),
            "groups": layer.groups,
            "padding_mode": layer.padding_mode,
        }
    elif kind == "embedding":
        more = {"padding_idx": layer.padding_idx}
    return LinearMap(kind=kind, weight=weight, bias=None if bias is None else bias.detach(), **more)


def keeping_random_state(of: LayerShape) -> AbstractContextManager[None]:
    """Return a context in which the parts of a layer are initialised, and after which the generators are as before."""
    return torch.random.fork_rng([of.device] if of.device.type == "cuda" else [])


def dense_layer(of: LayerShape) -> nn.Module:
    """Return a new layer of torch's with given sizes, initialised as torch does it.

    Example:
        >>> dense_layer(linear_map(nn.Conv2d(4, 8, (3, 1), padding="valid")).sizes)
        Conv2d(4, 8, kernel_size=(3, 1), stride=(1, 1))
    """
    where: dict[str, Any] = {"dtype": of.dtype, "device": of.device}
    if of.kind == "linear":
        return nn.Linear(of.inputs, of.outputs, of.bias, **where)
    if of.kind == "embedding":
        return nn.Embedding(of.inputs, of.outputs, of.padding_idx, **where)
    conv: Any = CONVS[len(of.kernel)]
    sizes = (of.kernel, of.stride, of.padding, of.dilation, of.groups, of.bias, of.padding_mode)
    built: nn.Module = conv(of.inputs, of.outputs, *sizes, **where)
    return built


def write_values(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer other values, in the layout of `LinearMap`, in place; a bias is added where it had none."""
    base, _ = _class_of(layer)
    own = layer._parameters["weight"]
    assert own is not None
    with torch.no_grad():
        own.copy_(weight.t() if base.__name__ == "Conv1D" else weight)
        known = layer._parameters.get("bias")
        if known is not None:
            known.copy_(torch.zeros_like(known) if bias is None else bias)
        elif bias is not None:
            layer.register_parameter("bias", nn.Parameter(bias.detach().to(own, copy=True), own.requires_grad))


def _class_of(layer: nn.Module) -> tuple[type[nn.Module], Kind]:
    """Return the class whose computation a layer has, and its kind, after all checks."""
    name = type(layer).__name__
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        raise UnreplaceableError(f"it is a {name}, a transposed convolution")
    found = next((one for one in _bases() if isinstance(layer, one[0])), None)
    if found is None:
        raise UnreplaceableError(f"it is a {name}, neither a linear layer nor a convolution nor an embedding")
    base, kind = found
    if is_parametrized(layer):
        raise UnreplaceableError("its weight is computed anew at each step by torch.nn.utils.parametrize")
    if any(part.endswith("_orig") for part in layer._parameters):
        raise UnreplaceableError("torch.nn.utils.prune has put a mask on it: call prune.remove first")
    if "weight_g" in layer._parameters:
        raise UnreplaceableError("weight_norm computes its weight anew at each step")
    weight = layer._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        raise UnreplaceableError("it is lazy: run the network once, so that its shapes are known")
    has_more = set(layer._parameters) - {"weight", "bias"} or layer._buffers or layer._modules
    if weight is None or has_more:
        raise UnreplaceableError(f"it is a {name} with other tensors than a weight and a bias")
    if any(getattr(type(layer), own, None) is not getattr(base, own, None) for own in _CODE) or "forward" in vars(
        layer
    ):
        raise UnreplaceableError(f"it is a {name} with a forward of its own")
    if not weight.is_floating_point() or weight.is_sparse or weight.is_quantized:
        raise UnreplaceableError(f"its weight is {'sparse' if weight.is_sparse else weight.dtype}")
    if type(weight) not in (nn.Parameter, Tensor):
        raise UnreplaceableError(f"its weight is a {type(weight).__name__}")
    if layer._compiled_call_impl is not None:
        raise UnreplaceableError("it is compiled")
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse or layer.scale_grad_by_freq):
        option = "max_norm" if layer.max_norm is not None else "sparse" if layer.sparse else "scale_grad_by_freq"
        raise UnreplaceableError(f"it is an embedding with {option}={getattr(layer, option)!r}")
    return base, kind


_CODE = ("forward", "_conv_forward", "__call__")


def _bases() -> tuple[tuple[type[nn.Module], Kind], ...]:
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return _BASES if conv1d is None else (*_BASES, (conv1d, "linear"))


def _padding(layer: nn.modules.conv._ConvNd) -> tuple[int, ...]:
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    both = [dilation * (size - 1) for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    if any(one % 2 for one in both):
        raise UnreplaceableError(
            f"padding='same' with kernel_size={layer.kernel_size} and dilation={layer.dilation} adds more on one side "
            f"than on the other"
        )
    return tuple(one // 2 for one in both)
