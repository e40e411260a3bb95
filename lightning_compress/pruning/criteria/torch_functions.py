"""The effect of torch's functions on a layer's channels, by the functions' names.

Names are compared without underscores: add, add_, __add__ and torch.ops.aten.add.Tensor are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The value of these functions has the same channels as their first argument.
CARRIERS = (
    _names(
        """alpha_dropout batch_norm batch_norm_elemt bfloat16 clone contiguous cpu cuda double dropout dropout1d
        dropout2d dropout3d feature_alpha_dropout feature_dropout float group_norm half instance_norm interpolate
        layer_norm local_response_norm masked_fill native_batch_norm native_dropout native_group_norm native_layer_norm
        neg negative positive rms_norm to type type_as"""
    )
    | {f"{kind}_pool{n}d" for kind in ("avg", "max", "lp", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
    | {f"{kind}_pool{n}d_with_indices" for kind in ("max", "adaptive_max") for n in (1, 2, 3)}
)

PRODUCTS = _names("mul multiply")
ARITHMETIC = PRODUCTS | _names("add addcdiv addcmul div divide lerp rdiv rsub setitem sub subtract true_divide where")

NONLINEARITIES = _names(
    """celu clamp clamp_max clamp_min clip cos elu erf expit gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu
    log_sigmoid logsigmoid maximum minimum mish prelu relu relu6 rrelu selu sigmoid silu sin softplus softshrink
    softsign tanh tanhshrink threshold"""
)

# These functions read properties of a tensor or borrow its shape; they pass none of its values on to the network.
QUERIES = _names(
    """batch_norm_stats detach dim empty_like get is_contiguous is_floating_point new_empty new_full new_ones new_tensor
    new_zeros numel ones_like rand_like randn_like register_hook requires_grad retain_grad size zeros_like"""
)


def function_name(func: Callable[..., Any]) -> str:
    """Return a function's name without the parts that distinguish its variants.

    >>> import torch
    >>> function_name(Tensor.add_), function_name(Tensor.__setitem__), function_name(torch.ops.aten.relu.default)
    ('add', 'setitem', 'relu')
    """
    return _plain(_raw_name(func))


@lru_cache(maxsize=1024)
def _plain(name: str) -> str:
    return name.removeprefix("special_").strip("_")


def is_inplace(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes into one of its arguments."""
    return _raw_name(func).endswith("_") or bool(kwargs.get("inplace", False)) or "out" in kwargs


def outputs_of(name: str, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """Return the tensors that a call has made or written to."""
    return [args[0]] if name == "setitem" else list(tensors_in(result))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested sequences, in order.

    >>> import torch
    >>> [tensor.item() for tensor in tensors_in([torch.tensor(1), (torch.tensor(2), None, 3)])]
    [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            if isinstance(item, Tensor):
                yield item
            elif not isinstance(item, int | float | str | None):
                yield from tensors_in(item)


def _raw_name(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", "")
    return name.partition(".")[0]
