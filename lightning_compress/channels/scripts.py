"""Scripted and traced parts of a network: torch.export looks into them, or else they are a single operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

_CLOSED: dict[int, _Part] = {}  # by number the scripted methods of networks that are being planned
_NUMBERS = count()


@contextmanager
def scripts_callable(model: nn.Module) -> Iterator[None]:
    """Let torch.export trace scripted modules, and let double precision call them, within `entries_restored`."""
    with ExitStack() as back:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                for name in module._c._method_names():
                    part = _Part(module._c._get_method(name))
                    number = next(_NUMBERS)
                    _CLOSED[number] = part
                    back.callback(_CLOSED.pop, number)
                    vars(module)[name] = part.entrance(number)
        yield


class _Part:
    """A method of a scripted module.

    A method with constants in single precision, such as that of a frozen module, is called in single precision.
    torch.export traces the method's operators. If constants or control flow on data prevent that, it records the
    operator `closed_part`, which the planner does not know, so that all channels that it touches are frozen.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self._single: bool | None = None
        self._outputs: dict[tuple[Any, ...], tuple[list[Any], TreeSpec]] = {}  # by the inputs' shapes
        self._inputs: TreeSpec | None = None

    def entrance(self, number: int) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                return self._run(args, kwargs)
            if not self._single:
                try:
                    with torch._C.DisableTorchFunctionSubclass():  # else torch would pass the module twice
                        return self._method(*args, **kwargs)
                except Exception:  # torch's tracer may raise anything
                    if not self._outputs:
                        raise
            leaves, self._inputs = tree_flatten((args, kwargs))
            _, spec = self._outputs[_shapes(leaves)]
            return tree_unflatten(torch.ops.lightning_compress.closed_part(leaves, number), spec)

        return called

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():
            if self._single is None:
                try:
                    result = self._method(*args, **kwargs)
                    self._single = False
                except RuntimeError:
                    self._single = True
            if self._single:
                args, kwargs = convert(torch.float32, torch.float64, (args, kwargs))
                result = convert(torch.float64, torch.float32, self._method(*args, **kwargs))
            else:
                result = self._method(*args, **kwargs)
        leaves, spec = tree_flatten(result)
        self._outputs[_shapes(tree_flatten((args, kwargs))[0])] = ([_empty(one) for one in leaves], spec)
        return result

    def closed(self, leaves: list[Any]) -> list[Any]:
        assert self._inputs is not None
        args, kwargs = tree_unflatten(leaves, self._inputs)
        return [one.clone() for one in tree_flatten(self._run(args, kwargs))[0]]

    def like(self, leaves: list[Any]) -> list[Any]:
        return [torch.empty_like(one, device=leaves[0].device) for one in self._outputs[_shapes(leaves)][0]]


# torch below 2.7 does not infer a schema from list[Tensor].
@torch.library.custom_op(
    "lightning_compress::closed_part", mutates_args=(), schema="(Tensor[] inputs, int number) -> Tensor[]"
)
def _closed_part(inputs: list[Tensor], number: int) -> list[Tensor]:
    return _CLOSED[number].closed(inputs)


@_closed_part.register_fake
def _(inputs: list[Tensor], number: int) -> list[Tensor]:
    return _CLOSED[number].like(inputs)


def _shapes(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(one.shape) if isinstance(one, Tensor) else one for one in leaves)


def _empty(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def convert(dtype: torch.dtype, other: torch.dtype, tree: Any) -> Any:
    """Give the tensors of another dtype in nested arguments this one."""
    return tree_map_only(Tensor, lambda one: one.to(dtype) if one.dtype == other else one, tree)
