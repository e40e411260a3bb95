"""Finds the activation of a layer, its output after the non-linearity, while the model runs.

    conv ----> batch_norm ----> relu ----> matmul     A forward hook tags the layer's output, the tag follows the
     '---tag------'----tag------'                     channels, and the value of the first non-linearity is reported.

The model is not exported: a ``TorchFunctionMode`` sees every function that the forward pass calls, from a module, as a
functional or as a tensor method, so that control flow and shared modules are no obstacle.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lightning_compress.pruning.criteria.tensor_tags import TensorMarks, is_same
from lightning_compress.pruning.criteria.torch_functions import (
    ARITHMETIC,
    CARRIERS,
    NONLINEARITIES,
    PRODUCTS,
    QUERIES,
    function_name,
    is_inplace,
    outputs_of,
    tensors_in,
)


@dataclass(frozen=True, eq=False)
class Activation:
    """The activation of a layer in one of its calls. The layer's channels lie along ``dim`` of ``tensor``.

    ``version`` counts the writes to the tensor up to the moment when it held the activation.
    """

    layer: str
    tensor: Tensor
    dim: int
    version: int

    def check_unmodified(self) -> None:
        """Raise a ValueError if the tensor has been written to since its values were the layer's activation."""
        if _version(self.tensor) != self.version:
            raise ValueError(
                f"the activation of {self.layer!r}, a tensor of shape {tuple(self.tensor.shape)}, was modified in "
                "place before it was measured: use out-of-place operations on it (x = x + y instead of x += y, "
                "inplace=False), or exclude the layer"
            )


@dataclass(eq=False)
class LayerCall:
    """One call of a watched layer. Its ``size`` channels lie along ``dim`` of its output."""

    layer: str
    dim: int
    size: int
    place: Tensor | None = None  # the activation, if no non-linearity follows
    version: int = 0
    settled: bool = False  # whether the place is final

    def lies_in(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has as many channels in the same dimension."""
        return -tensor.dim() <= self.dim < tensor.dim() and tensor.shape[self.dim] == self.size


@dataclass(eq=False)
class _Value:
    """The value of a non-linearity on ``calls``, reported once it is clear that it is no gate, as in x * sigmoid(x)."""

    tensor: Tensor | None
    version: int
    calls: frozenset[LayerCall]


class ActivationTrace(TorchFunctionMode):
    """Reports the activation of every watched layer while a forward pass runs.

    The activation is the value of the first non-linearity that the layer's output reaches through operations that keep
    its channels (norms, arithmetic, dropout, pooling, casts). After a sum it belongs to all summands. If the output
    goes to several non-linearities, all their values are reported; in x * sigmoid(x) the activation is the product. If
    the output reaches no non-linearity, the activation is its last value before another operation takes it (a matmul, a
    reshape, the loss) or before the forward pass ends, and it is reported then. Channels are dimension 1 of a
    convolution and the last dimension of a linear layer.

    Compiled modules run eagerly while the trace is active. The trace removes its hooks when it ends.

    Args:
        model: The module that the names are relative to; its caller may use a wrapper of it.
        layers: Qualified names of linear layers and convolutions.
        on_activation: Called with every activation.

    Raises:
        ValueError: A name is not that of such a layer, or an activation was modified in place before it was reported.

    >>> import torch.nn.functional as F
    >>> net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4))
    >>> def show(found: Activation) -> None:
    ...     print(found.layer, tuple(found.tensor.shape), "negative values:", bool((found.tensor < 0).any()))
    >>> with ActivationTrace(net, ["0", "4"], on_activation=show):
    ...     loss = F.cross_entropy(net(torch.randn(50, 1, 3)), torch.zeros(50, dtype=torch.long))
    0 (50, 2, 3) negative values: False
    4 (50, 4) negative values: True
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], *, on_activation: Callable[[Activation], None]) -> None:
        super().__init__()
        self.layers = {name: get_layer(model, name) for name in layers}
        self.on_activation = on_activation
        self._tags: TensorMarks[frozenset[LayerCall | None]] = TensorMarks()
        self._values: TensorMarks[_Value] = TensorMarks()
        self._unreported: dict[_Value, None] = {}  # a set in order
        self._calls: list[LayerCall] = []
        self._exit = ExitStack()

    def begin(self) -> None:
        """Start to watch the layers. A trace that is still active, because its step failed, is discarded first."""
        self.discard()
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(partial(self._start_call, name)).remove)
            # Importing torch._dynamo takes seconds; if nobody has imported it, nothing is compiled. If another trace
            # has already set the stance, it restores the original one, perhaps before this trace ends.
            dynamo = sys.modules.get("torch._dynamo")
            if dynamo is not None and dynamo.eval_frame._stance.stance != "force_eager":
                # A compiled graph calls neither the hooks nor this mode.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            super().__enter__()  # type: ignore[no-untyped-call]
            stack.callback(super().__exit__, None, None, None)
            self._exit = stack.pop_all()

    def end(self) -> None:
        """Stop after the forward pass and before the backward pass, and report all other activations; idempotent."""
        self._exit.close()
        try:
            for value in list(self._unreported):
                self._report(value)
            places = {(call.layer, id(call.place)): call for call in self._calls}
            for call in places.values():
                if call.place is not None:
                    self._emit(Activation(call.layer, call.place, call.dim, call.version))
        finally:
            self.discard()

    def discard(self) -> None:
        """Stop without a further report, as after an exception; idempotent."""
        self._exit.close()
        self._tags.clear()
        self._values.clear()
        self._unreported.clear()
        self._calls.clear()

    def __enter__(self) -> ActivationTrace:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        else:
            self.discard()

    def _origins(self, tensor: Tensor) -> frozenset[LayerCall | None]:
        """Return the calls whose channels ``tensor`` holds, and None if other values have been mixed in."""
        return self._tags.get(tensor) or frozenset()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        inputs = [] if name in QUERIES else list(tensors_in((*args, *kwargs.values())))
        origins = [self._origins(x) for x in inputs]
        values = self._values_in(inputs)
        if not values and not any(origins):
            return func(*args, **kwargs)
        writes = is_inplace(func, kwargs)
        if writes or not (name in ARITHMETIC or name in NONLINEARITIES):
            while values:  # reported now, because the function may overwrite them
                self._report(values.pop())
        result = func(*args, **kwargs)
        output = next((y for y in outputs_of(name, args, result) if y.is_floating_point()), None)
        # A function such as flatten may have nothing to do and return its input.
        if output is not None and (writes or not any(is_same(output, x) for x in inputs)):
            self._follow(name, inputs, origins, output, values)
        return result

    def _start_call(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        with torch._C.DisableTorchFunction():  # else this mode would see the calls that follow
            dim = channel_dim(layer)
            call = LayerCall(name, dim, output.shape[dim])
            self._calls.append(call)
            self._tag(output, frozenset((call,)))

    def _tag(self, tensor: Tensor, origins: frozenset[LayerCall | None]) -> None:
        calls = _calls(origins)
        self._tags.set(tensor, origins if calls else None)
        for call in calls:
            if not call.settled:
                call.place, call.version = tensor, _version(tensor)

    def _follow(
        self,
        name: str,
        inputs: list[Tensor],
        origins: list[frozenset[LayerCall | None]],
        output: Tensor,
        values: list[_Value],
    ) -> None:
        """Hand the tags of a function's inputs on to its output."""
        arriving = frozenset[LayerCall | None]().union(*origins)
        bent = frozenset[LayerCall]()  # the calls whose non-linearity is complete with this function
        kept = frozenset[LayerCall | None]()
        if name in NONLINEARITIES:
            bent = _calls(arriving)
        elif name in CARRIERS:
            kept = origins[0]
        elif name in ARITHMETIC:
            others = any(_is_data(x) and not known for x, known in zip(inputs, origins, strict=True))
            kept = arriving | {None} if others else arriving
            if name in PRODUCTS:
                bent = _calls(arriving) & frozenset[LayerCall]().union(*(gate.calls for gate in values))
                for gate in values:
                    gate.calls -= bent
        kept = frozenset(call for call in kept - bent if call is None or call.lies_in(output))

        for call in _calls(arriving - kept):
            call.settled = True
        for call in bent:
            call.place = None
        self._tag(output, kept)
        self._values.set(output, None)
        if bent:
            value = _Value(output, _version(output), bent)
            self._unreported[value] = None
            self._values.set(output, value)
        elif len(values) == 1:
            self._values.set(output, values.pop())  # the value may become a gate, as in 1 + tanh(x)
        for value in values:
            self._report(value)

    def _values_in(self, tensors: list[Tensor]) -> list[_Value]:
        if not self._unreported:
            return []
        found = dict.fromkeys(self._values.get(tensor) for tensor in tensors)
        return [value for value in found if value in self._unreported]

    def _report(self, value: _Value) -> None:
        del self._unreported[value]
        tensor, value.tensor = value.tensor, None
        assert tensor is not None
        for layer, call in {call.layer: call for call in value.calls}.items():
            self._emit(Activation(layer, tensor, call.dim, value.version))

    def _emit(self, activation: Activation) -> None:
        activation.check_unmodified()
        self.on_activation(activation)


def get_layer(model: nn.Module, name: str) -> nn.Linear | _ConvNd:
    """Return the linear layer or convolution with that qualified name; raise a ValueError if there is none."""
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no layer {name!r}") from error
    if not isinstance(layer, nn.Linear | _ConvNd):
        raise ValueError(
            f"{name!r} is a {type(layer).__name__}, but only linear layers and convolutions have channels to prune: "
            "leave it out of target"
        )
    return layer


def channel_dim(layer: nn.Module) -> int:
    """Return the dimension of a layer's output that holds its channels: 1 for a convolution, else the last one."""
    return 1 if isinstance(layer, _ConvNd) else -1


def _is_data(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 1


def _calls(origins: frozenset[LayerCall | None]) -> frozenset[LayerCall]:
    return frozenset(call for call in origins if call is not None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
