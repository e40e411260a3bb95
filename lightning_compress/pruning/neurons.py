"""The neurons of a network: which slices of which tensors hold what a layer's output channels emit.

A channel whose slices of all members are zero emits zero up to the non-linearity. What else goes when a channel is cut
out of the network is another question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from lightning_compress.core.inputs import ExampleInputs, call
from lightning_compress.pruning.functions import (
    CONTRACTIONS,
    NORMS,
    OVER_LAST_DIMENSIONS,
    SHIFTING_NORMS,
    WEIGHTED,
    function_name,
    is_inplace,
    outputs_of,
    tensors_in,
)
from lightning_compress.pruning.groups import Member, Neurons
from lightning_compress.pruning.marks import TensorMarks
from lightning_compress.pruning.tracing import ActivationTrace


def find_neurons(
    model: nn.Module, example_inputs: ExampleInputs, layers: Sequence[str], *, network: nn.Module | None = None
) -> list[Neurons]:
    """Find the output channels of linear layers and convolutions, and all that they emit.

    The members of a channel are slices of the weight, of the bias, and of scale and shift of the norm that the layer's
    output, and nothing else, passes before the non-linearity. ``frozen`` says why a layer's channels have to stay: its
    output becomes the network's output (pooling, reshaping or a softmax in between make no difference), it was not
    called, its weight is shared or computed, or its channels cannot be silenced one by one.

    The network runs once, in eval mode and without gradients; modes, buffers and random states are put back.

    Args:
        model: the module that the names are relative to.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first.
        layers: qualified names of linear layers and convolutions.
        network: the submodule that takes the inputs and makes the prediction; by default the model itself.

    Raises:
        ValueError: if a name is no such layer, or the network's output holds no tensor.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
    >>> for found in find_neurons(net, torch.zeros(2, 1, 4, 4), ["0", "4"]):
    ...     print(found.name, found.size, [member.tensor for member in found.members], found.frozen)
    0 4 ['0.weight', '0.bias', '1.weight', '1.bias'] None
    4 10 ['4.weight', '4.bias'] its output is the network's output
    """
    wiring = _Wiring(model, layers)
    with _left_alone(model), torch.no_grad(), wiring:
        output = call(model if network is None else network, example_inputs)
        tensors = list(tensors_in(output))
        at_output = frozenset[str]().union(*(wiring.sources(tensor) for tensor in tensors))
    if not tensors:
        raise ValueError(
            f"the network's output is a {type(output).__name__} without a tensor, so that its output layer cannot be "
            "told: pass network= with the submodule whose output is the prediction"
        )
    found = []
    for name, layer in wiring.layers.items():
        members = _members(name, layer, wiring)
        found.append(Neurons(name, len(members[0].index), members, _reason_to_stay(name, layer, wiring, at_output)))
    return found


@dataclass(frozen=True)
class _NormCall:
    function: str
    layer: str | None  # whose output it sees, if it sees nothing else
    affine: dict[str, Member | None]  # its scale and shift, None where they are not one per channel of the layer


class _Wiring(TorchFunctionMode):
    """What one forward pass tells: which layers are called, which norms they pass, and what they reach."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.owners = _owners(model)
        self.called: frozenset[str] = frozenset()
        self.norm_calls: list[_NormCall] = []
        self._trace = ActivationTrace(model, layers, on_activation=lambda activation: None)
        self.layers = self._trace.layers
        self._sources: TensorMarks[frozenset[str]] = TensorMarks()

    def __enter__(self) -> _Wiring:
        self._trace.begin()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.called = self._trace.called
        self._trace.discard()

    def sources(self, tensor: Tensor) -> frozenset[str]:
        """The layers whose outputs reach the tensor without passing another weight."""
        direct = {origin.layer for origin in self._trace.origins(tensor) if origin is not None}
        whole = () if tensor._base is None else self._sources.get(tensor._base) or ()
        return (self._sources.get(tensor) or frozenset()).union(direct, whole)

    def norms(self, layer: str) -> list[_NormCall]:
        """The norms that see the layer's output and nothing else."""
        shared = {name for norm in self.norm_calls if norm.layer != layer for name in norm.affine}
        return [norm for norm in self.norm_calls if norm.layer == layer and shared.isdisjoint(norm.affine)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        inputs = list(tensors_in((args, kwargs)))
        if name in NORMS:
            self.norm_calls.append(self._norm_call(name, inputs))
        sources = frozenset[str]()
        if not (name in WEIGHTED or (name in CONTRACTIONS and any(map(_is_parameter, inputs)))):
            sources = sources.union(*map(self.sources, inputs))
        result = func(*args, **kwargs)
        for output in outputs_of(name, args, result):
            self._sources.set(output, sources)
            if output._base is not None and is_inplace(func, kwargs):
                self._sources.set(output._base, sources | self.sources(output._base))
        return result

    def _norm_call(self, name: str, inputs: list[Tensor]) -> _NormCall:
        x, *others = inputs
        origins = self._trace.origins(x)
        layers = {None if origin is None else origin.layer for origin in origins}
        origin = next(iter(origins)) if len(layers) == 1 else None
        affine: dict[str, Member | None] = {}
        for tensor in others:
            if (parameter := self.parameter_names.get(id(tensor))) is not None:
                # Scale and shift of a layer or RMS norm span the last dimensions, of the others dimension 1.
                first = x.dim() - tensor.dim() if name in OVER_LAST_DIMENSIONS else 1
                dim = -1 if origin is None else origin.dim % x.dim() - first
                affine[parameter] = (
                    Member(parameter, dim, _each(tensor.shape[dim])) if 0 <= dim < tensor.dim() else None
                )
        return _NormCall(name, None if origin is None else origin.layer, affine)


def _reason_to_stay(name: str, layer: nn.Linear | _ConvNd, wiring: _Wiring, at_output: frozenset[str]) -> str | None:
    if name not in wiring.called:
        return "it was not called in the forward pass of the example inputs"
    if layer._parameters.get("weight") is None:
        return "its weight is computed from other parameters"
    if name in at_output:
        return "its output is the network's output"
    if isinstance(layer, _ConvTransposeNd) and layer.groups > 1:
        return "a grouped transposed convolution's weight has no slice that is one output channel"
    owners = wiring.owners[id(layer.weight)]
    if len(owners) > 1:
        return "its weight is shared: " + ", ".join(owners)
    for norm in wiring.norms(name):
        if norm.function in SHIFTING_NORMS and None in (norm.affine.values() or [None]):
            return f"a {norm.function} without a scale per channel follows, which makes a silent channel speak again"
    return None


def _members(name: str, layer: nn.Linear | _ConvNd, wiring: _Wiring) -> tuple[Member, ...]:
    weight_name = wiring.parameter_names.get(id(layer.weight), f"{name}.weight")
    if isinstance(layer, _ConvTransposeNd):  # weight: (in, out / groups, ...)
        channels = layer.weight.shape[1]
        members = [Member(weight_name, 1, (torch.arange(channels * layer.groups) % channels).unsqueeze(1))]
    else:
        members = [Member(weight_name, 0, _each(layer.weight.shape[0]))]
    if layer.bias is not None:
        members.append(Member(wiring.parameter_names.get(id(layer.bias), f"{name}.bias"), 0, _each(len(layer.bias))))
    affine = {member.tensor: member for norm in wiring.norms(name) for member in norm.affine.values() if member}
    return (*members, *affine.values())


def _each(size: int) -> Tensor:
    return torch.arange(size).unsqueeze(1)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """For every parameter, by its id, the modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, and put modes, buffers and random states back."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            for module in modes:
                module.training = False
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer.copy_(values)
