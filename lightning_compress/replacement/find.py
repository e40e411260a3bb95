"""Which layers of a network another module may take the place of, and why others may not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_compress.core.evaluation import entries_restored, evaluating
from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call
from lightning_compress.core.hooks import Removable, hooked
from lightning_compress.replacement.layer import LayerShape, LinearMap, UnreplaceableError, linear_map
from lightning_compress.replacement.swap import Replaced

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer that may be replaced.

    Attributes:
        map: What it computes.
        calls: How often it runs in a forward pass.
        inputs: The shape of its input at each call, for the batch of example inputs.
        macs: Its multiply-accumulates for one sample, over all calls.
        tied: The other layers whose weight is this one's, where `find_layers` was asked for them.
    """

    map: LinearMap
    calls: int
    inputs: tuple[tuple[int, ...], ...]
    macs: int
    tied: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FoundLayers:
    """The layers of a network.

    Attributes:
        layers: Those that may be replaced, by path, in the network's order.
        refused: Why other linear layers, convolutions and embeddings may not, by path.
    """

    layers: Mapping[str, Layer]
    refused: Mapping[str, str]


def find_layers(network: nn.Module, example_inputs: ExampleInputs, *, tied: bool = False) -> FoundLayers:
    """Return the layers that another module may take the place of, and the reasons why others may not.

    The network runs once, in evaluation mode, and stays as it is.

    Args:
        network: The network.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first.
        tied: Whether layers that share one weight with one another alone may be replaced, all of them together.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4), nn.ConvTranspose1d(1, 1, 1))
        >>> found = find_layers(net[:3], torch.zeros(2, 3, 3, 3))
        >>> {path: (layer.map.kind, layer.inputs, layer.macs) for path, layer in found.layers.items()}
        {'0': ('conv', ((2, 3, 3, 3),), 216), '2': ('linear', ((2, 8),), 32)}
    """
    candidates: dict[str, nn.Module] = {}
    maps: dict[str, LinearMap] = {}
    refused: dict[str, str] = {}
    parts = _parts_of_replaced(network)
    for path, module in network.named_modules():
        if isinstance(module, Replaced):
            refused[path] = f"it is replaced already, by the form {module.form!r}"
        elif isinstance(module, _LAYERS) or type(module).__name__ == "Conv1D":
            candidates[path] = module
            try:
                maps[path] = linear_map(module)
            except UnreplaceableError as error:
                refused[path] = str(error)
            if module in parts:
                refused[path] = f"it is a part of {parts[module]!r}, which is replaced already"
    compiled = _inside_compiled(network)
    seen = _watched(network, example_inputs, {path: one for path, one in candidates.items() if path in maps})
    owners = _owners(network)
    samples = batch_size(example_inputs)
    layers: dict[str, Layer] = {}
    for path, found in maps.items():
        module, calls = candidates[path], seen.calls[path]
        sharing = _sharing(module, owners)
        reason = refused.get(path) or _why_not(path, module, seen, compiled, sharing, maps if tied else {})
        if reason:
            refused[path] = reason
        else:
            sizes = found.sizes
            macs = sum(_macs(sizes, one) for one in seen.outputs[path]) // samples
            layers[path] = Layer(map=found, calls=len(calls), inputs=tuple(calls), macs=macs, tied=tuple(sharing))
    for path in [path for path, one in layers.items() if any(other not in layers for other in one.tied)]:
        other = next(one for one in layers[path].tied if one in refused or one not in layers)
        refused[path] = f"it has one weight with {other!r}, which can't be replaced: {refused.get(other, 'see there')}"
        del layers[path]
    return FoundLayers(layers=layers, refused={path: refused[path] for path in candidates | refused if path in refused})


def _why_not(
    path: str,
    module: nn.Module,
    seen: _Seen,
    compiled: Mapping[nn.Module, str],
    sharing: list[str],
    maps: Mapping[str, LinearMap],
) -> str:
    weight = module._parameters["weight"]
    assert weight is not None
    if module in compiled:
        return f"it is inside {compiled[module]}, which torch.compile has compiled"
    if not weight.requires_grad:
        return "it is frozen: its weight has requires_grad=False"
    if sharing and not all(other in maps for other in sharing):
        return f"its weight or bias is also that of {', '.join(map(repr, sharing))}"
    if path in seen.read:
        return (
            f"other code reads its weight, by {seen.read[path]}, without calling the layer, as torch's "
            f"MultiheadAttention does with out_proj"
        )
    if not seen.calls[path]:
        return "the example inputs never reach it"
    return ""


def _macs(sizes: LayerShape, output: tuple[int, ...]) -> int:
    if sizes.kind == "embedding":
        return 0
    return math.prod(output) * (sizes.inputs // sizes.groups) * math.prod(sizes.kernel)


def _parts_of_replaced(network: nn.Module) -> dict[nn.Module, str]:
    return {
        part: path
        for path, module in network.named_modules()
        if isinstance(module, Replaced)
        for part in module.modules()
        if part is not module
    }


def _inside_compiled(network: nn.Module) -> dict[nn.Module, str]:
    """Return the modules in compiled ones, with the name of the outermost."""
    inside: dict[nn.Module, str] = {}
    for path, module in network.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            for part in module.modules():
                inside.setdefault(part, repr(path) if path else type(module).__name__)
    return inside


def _owners(network: nn.Module) -> dict[int, list[tuple[nn.Module, str, str]]]:
    """Return the modules that have each parameter, with its name there, and their path."""
    owners: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, module in network.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name, path))
    return owners


def _sharing(module: nn.Module, owners: Mapping[int, list[tuple[nn.Module, str, str]]]) -> list[str]:
    """Return what else has the weight or the bias of a layer: the path of a layer for its weight, or a full name."""
    found: dict[str, None] = {}
    for own, parameter in module._parameters.items():
        for other, name, path in owners[id(parameter)] if parameter is not None else ():
            if other is not module:
                plain = own == name == "weight"
                found[path if plain else f"{path}.{name}".lstrip(".")] = None
    return list(found)


# ---------------------------------------------------------------------- what a forward pass does with layers


@dataclass
class _Seen:
    """What one forward pass has done.

    Attributes:
        calls: By path the shapes of the inputs of a layer's calls.
        outputs: By path the shapes of the outputs.
        read: By path the function by which other code than the layer's own has read its weight.
    """

    calls: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    outputs: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)


class _Readers(TorchFunctionMode):
    """Notes the functions that get the weights of layers while these do not run themselves."""

    def __init__(self, weights: Mapping[int, str], running: list[str], read: dict[str, str]) -> None:
        super().__init__()
        self.weights, self.running, self.read = weights, running, read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list):
            for one in tree_leaves((args, kwargs or {})):
                path = self.weights.get(id(one)) if isinstance(one, Tensor) else None
                if path is not None and path not in self.running and _has_tensor(result):
                    self.read.setdefault(path, getattr(func, "__name__", str(func)))
        return result


def _has_tensor(result: Any) -> bool:
    return any(isinstance(one, Tensor) for one in tree_leaves(result))


def _watched(network: nn.Module, example_inputs: ExampleInputs, layers: Mapping[str, nn.Module]) -> _Seen:
    """Run the network once, and return what it does with layers."""
    seen = _Seen({path: [] for path in layers}, {path: [] for path in layers})
    running: list[str] = []
    weights = {id(one._parameters["weight"]): path for path, one in layers.items()}
    tied = {path: weights[id(one._parameters["weight"])] for path, one in layers.items()}  # the one that is noted
    handles: list[Removable] = []

    def watch(path: str, layer: nn.Module) -> None:
        def begins(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            running.append(tied[path])
            first = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
            seen.calls[path].append(() if first is None else tuple(first.shape))

        def ends(_module: nn.Module, _args: Any, output: Any) -> None:
            running.pop()
            seen.outputs[path].append(tuple(output.shape) if isinstance(output, Tensor) else ())

        handles.append(layer.register_forward_pre_hook(begins, with_kwargs=True))
        handles.append(layer.register_forward_hook(ends, always_call=True))

    for path, layer in layers.items():
        watch(path, layer)
    with hooked(*handles), plainly(network), _Readers(weights, running, seen.read):
        try:
            call(network, example_inputs)
        except Exception as error:  # whatever the network's code raises
            shapes = ", ".join(str(tuple(one.shape)) for one in tree_leaves(example_inputs) if isinstance(one, Tensor))
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"{type(network).__name__} does not run with example_inputs of shape {shapes or 'none'}: {line} Give "
                f"example_inputs= with which its forward runs, batch first."
            ) from error
    seen.read |= {path: seen.read[one] for path, one in tied.items() if one in seen.read}
    return seen


@contextmanager
def plainly(network: nn.Module) -> Iterator[None]:
    """Run a network in evaluation mode, layer by layer, without gradients, and leave it as it was."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with evaluating(network), entries_restored(network), torch.compiler.set_stance("force_eager"):
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it reads the weights of layers without calling them
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
