"""A layer becomes another module in place, with parts of its own, and can become the layer again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_compress.core.change_class import Changed, become_dense, change_class
from lightning_compress.core.tensors import memory_format
from lightning_compress.replacement.layer import LayerShape, keeping_random_state, linear_map, write_values

_READS = ("in_features", "in_channels", "num_embeddings", "nx")  # attributes of torch's and transformers' layers
_RETURNS = ("out_features", "out_channels", "embedding_dim", "nf")
_SHARED: Any = WeakTensorKeyDictionary()  # by weight that has left: weak references to what its layers share now


class Replaced(Changed):
    """A layer that has become another module, in place. Subclasses are the forms that it may take; none is constructed.

    A form supplies `form`, `check`, `parts` and, where its parts do not run one after the other, `forward`. Its parts
    are ordinary layers, which other techniques find by themselves.

    Attributes:
        form: The name of the form in records, unique within one kind of record.
        shares: Names of parameters of parts, such as "first.weight", that are one and the same for all layers that had
            one weight together, by a key of the form's own: {"first.weight": "entries"}.
        numbers: The form's numbers, such as {"rank": 8}: with the layer's sizes they say which parts it has.
        of: The sizes of the layer for which the parts were made.
        was: The sizes of the layer itself: `of`, unless a record said what a cut had left of another one.
    """

    form: ClassVar[str]
    shares: ClassVar[Mapping[str, str]] = {}
    numbers: dict[str, Any]
    of: LayerShape
    was: LayerShape

    @classmethod
    def check(cls, of: LayerShape, numbers: Mapping[str, Any]) -> None:
        """Raise a ValueError, which says what was expected, unless such a layer can take this form."""
        raise NotImplementedError(f"{cls.__name__} must supply check().")

    @classmethod
    def parts(cls, of: LayerShape, numbers: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Return the parts by name, in their order, initialised as torch does it, on the layer's device."""
        raise NotImplementedError(f"{cls.__name__} must supply parts().")

    def dense_weight(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias of the layer that computes the same, in the layout of `LinearMap`."""
        raise NotImplementedError(f"No single layer computes what a layer of the form {self.form!r} does.")

    def forward(self, x: Tensor) -> Tensor:
        for part in self._modules.values():
            assert part is not None
            x = part(x)
        return x

    def widths(self) -> tuple[int, int]:
        """Return how many features or channels it reads and returns now; a cut may have taken some."""
        layers = [linear_map(one).sizes for one in self.modules() if "weight" in one._parameters and _is_layer(one)]
        return (layers[0].inputs, layers[-1].outputs) if layers else (self.of.inputs, self.of.outputs)

    def extra_repr(self) -> str:
        """Return what it was, and its numbers."""
        numbers = ", ".join(f"{name}={value!r}" for name, value in self.numbers.items())
        return f"{self._dense.kind.__name__} as {self.form!r}{', ' if numbers else ''}{numbers}"

    def __getattr__(self, name: str) -> Any:
        if name in _READS or name in _RETURNS:
            dense = vars(self).get("_dense")
            if dense is not None and name in dense.entries:
                return self.widths()[name in _RETURNS]
        return super().__getattr__(name)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding)


def swap(
    layer: nn.Module,
    form: type[Replaced],
    numbers: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
    *,
    of: LayerShape | None = None,
) -> Callable[[], None]:
    """Make a layer a module of another form, in place, and return a function that undoes it.

    The layer keeps its identity, its hooks, its mode, its type and device, and its attributes. Its parts are trained
    where its weight was.

    Args:
        layer: A linear layer, convolution or embedding.
        form: The class that it takes.
        numbers: The form's numbers.
        values: The parameters of the parts, and any buffers, by name: {"first.weight": ...}. None: torch's
            initialisation, which draws from the global random generator; with values nothing is drawn.
        of: The sizes with which to build the parts, where these are not the layer's own.

    Raises:
        UnreplaceableError: The layer is no linear map, or not only that.
        ValueError: The form does not fit the layer, or the values do not fit the form. The layer is as it was.

    Example:
        >>> class Bottleneck(Replaced):
        ...     form = "bottleneck"
        ...     @classmethod
        ...     def check(cls, of, numbers):
        ...         if numbers["rank"] < 1:
        ...             raise ValueError(f"rank must be 1 or more; got {numbers['rank']}.")
        ...     @classmethod
        ...     def parts(cls, of, numbers):
        ...         return {"first": nn.Linear(of.inputs, numbers["rank"]), "second": nn.Linear(2, of.outputs)}
        >>> layer = nn.Linear(8, 4)
        >>> undo = swap(layer, Bottleneck, {"rank": 2})
        >>> layer
        Bottleneck(
          Linear as 'bottleneck', rank=2
          (first): Linear(in_features=8, out_features=2, bias=True)
          (second): Linear(in_features=2, out_features=4, bias=True)
        )
        >>> undo()
        >>> layer
        Linear(in_features=8, out_features=4, bias=True)
    """
    own = linear_map(layer).sizes
    of = own if of is None else of
    form.check(of, numbers)
    parts = _made(form, of, numbers, values)
    weight = layer._parameters["weight"]
    assert weight is not None
    bias = layer._parameters.get("bias")
    for part in parts.values():
        part.train(layer.training)
        if memory_format(weight) is torch.channels_last:
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, parameter in part.named_parameters():
            is_bias = bias is not None and name.rpartition(".")[2] == "bias"
            parameter.requires_grad_(bias.requires_grad if is_bias else weight.requires_grad)  # type: ignore[union-attr]
    added = {"numbers": dict(numbers), "of": of, "was": own}
    undo = change_class(layer, form, added, without=(*_READS, *_RETURNS))
    for name, part in parts.items():
        layer.add_module(name, part)
    _share(layer, form, weight)
    return undo


def size_of(form: type[Replaced], of: LayerShape, numbers: Mapping[str, Any]) -> int:
    """Return the number of parameters that the parts of a form have, without the memory for them."""
    where = LayerShape.of_record(of.record(), dtype=of.dtype, device=torch.device("meta"))
    with torch.random.fork_rng([]):
        parts = form.parts(where, numbers)
    return sum(one.numel() for part in parts.values() for one in part.parameters())


def _made(
    form: type[Replaced], of: LayerShape, numbers: Mapping[str, Any], values: Mapping[str, Tensor] | None
) -> dict[str, nn.Module]:
    """Return a form's parts, with the given values or those of torch's initialisation."""
    if values is None:
        return form.parts(of, numbers)
    with keeping_random_state(of):  # the values are not used
        parts = form.parts(of, numbers)
    holder = nn.ModuleDict(parts)
    own = dict(holder.named_parameters()), dict(holder.named_buffers())
    if (missing := set(own[0]) - set(values)) or (unknown := set(values) - {*own[0], *own[1]}):
        what = f"lacks {min(missing)!r}" if missing else f"has {min(unknown)!r}"
        raise ValueError(f"The form {form.form!r} has the parameters {', '.join(own[0])}, and values= {what}.")
    with torch.no_grad():
        for name, value in values.items():
            tensor = own[0].get(name, own[1].get(name))
            assert tensor is not None
            if tensor.shape != value.shape:
                raise ValueError(
                    f"{name} of the form {form.form!r} has shape {tuple(tensor.shape)}, and values= has one of "
                    f"{tuple(value.shape)} for it."
                )
            tensor.copy_(value)
    return parts


def _share(layer: nn.Module, form: type[Replaced], weight: Tensor) -> None:
    """Let layers that had one weight together share what their forms say."""
    known = _SHARED.get(weight, {})
    for name, key in form.shares.items():
        path, _, attribute = name.rpartition(".")
        part = layer.get_submodule(path)
        mine, other = part._parameters[attribute], known[key]() if key in known else None
        assert mine is not None
        if other is not None and (other.shape, other.dtype, other.device) == (mine.shape, mine.dtype, mine.device):
            part._parameters[attribute] = other
        else:
            known = known | {key: weakref.ref(mine)}
    if known:
        _SHARED[weight] = known


def restore(layer: Replaced, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Make a replaced layer the layer that it was, with the values given, or else with undefined ones.

    Args:
        layer: The layer.
        weight: In the layout of `LinearMap`.
        bias: One is added where the layer had none; zeros where the layer has one and None is given.
    """
    become_dense(layer)
    if weight is not None:
        write_values(layer, weight, bias)


def replaced(network: nn.Module) -> dict[str, Replaced]:
    """Return the replaced layers in a network, by path."""
    return {path: one for path, one in network.named_modules() if isinstance(one, Replaced)}
