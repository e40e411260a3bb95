"""A sandbox for trial cuts: the model with random parameters, in double precision."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_compress.channels.attention import make_sliceable
from lightning_compress.channels.scripts import convert, scripts_callable
from lightning_compress.core.evaluation import (
    entries_restored,
    modes_restored,
    random_state_restored,
    set_mode,
    take_rounding_away,
)
from lightning_compress.core.example_inputs import ExampleInputs


@contextmanager
def sandbox(model: nn.Module) -> Iterator[None]:
    """Give a network random parameters, double precision and evaluation mode, and restore everything afterwards.

    Every branch of the network then changes the outputs, also one that a tiny layer scale or a norm that starts at
    zero would hide, and a difference is either rounding or an error.
    """
    generator = torch.Generator().manual_seed(0)
    # Others in their place: the network's own carry hooks, such as DistributedDataParallel's, which a new dtype drops.
    others: dict[int, Tensor] = {
        id(one): _random_parameter(name, one, generator) for name, one in model.named_parameters()
    }
    others |= {id(one): _double(name, one, generator) for name, one in model.named_buffers()}
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    with ExitStack() as back:
        back.enter_context(_old_objects_left_alone())
        back.callback(_let_go, others.values())
        back.enter_context(torch.compiler.set_stance("force_eager"))
        # torch below 2.7 refuses to trace compiled modules, although they are called as they were before.
        back.enter_context(torch._dynamo.config.patch(error_on_nested_fx_trace=False))
        back.enter_context(random_state_restored(model))
        back.enter_context(torch.no_grad())
        back.enter_context(entries_restored(model))
        for table in tables:  # also those of scripted modules, which are not among their entries
            back.callback(_fill, table, dict(table.items()))
        back.callback(torch.set_default_dtype, torch.get_default_dtype())
        take_rounding_away(model)
        for table in tables:
            _fill(table, {name: others.get(id(one), one) for name, one in table.items()})
        for module in model.modules():
            _double_attributes(vars(module), others)
        for context in (modes_restored(model), all_sliceable(model), scripts_callable(model), _Doubles()):
            back.enter_context(context)
        torch.set_default_dtype(torch.float64)  # for constants that the network's code makes
        set_mode(model, True)
        set_mode(model, False)  # in two steps, so that what modules keep for evaluation is made anew of these weights
        yield


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Restrict Python's frequent garbage collections to new objects, because torch alone has a million old ones."""
    if gc.get_freeze_count():  # someone else's
        yield
        return
    gc.collect(1)  # what is young and garbage would stay until later
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _let_go(tensors: Iterable[Tensor]) -> None:
    """Free the tensors' memory now: torch.export keeps them in circles, which are collected at some later time."""
    for tensor in tensors:
        tensor.data = tensor.data.new_empty(0)


def _fill(table: Any, values: dict[str, Any]) -> None:
    """Write into a module's table of parameters or buffers; a scripted module's takes no others than it has."""
    for name, value in values.items():
        if table[name] is not value:
            table[name] = value


def _double_attributes(entries: dict[str, Any], known: Mapping[int, Tensor]) -> None:
    """Put tensors in double precision in place of those that a module holds as attributes, in dicts and lists too.

    `known` has, by the id of a parameter or buffer, what stands for it already.
    """
    for name, value in list(entries.items()):
        if name not in ("_parameters", "_buffers", "_modules") and isinstance(value, Tensor | list | tuple | dict):
            entries[name] = _doubled(value, known)


def _doubled(value: Any, known: Mapping[int, Tensor]) -> Any:
    if isinstance(value, nn.Parameter):  # recurrent layers keep a list of theirs
        return known.get(id(value), value)
    if isinstance(value, Tensor):
        return known.get(id(value), _wide(value.detach()))
    if type(value) is list:
        value[:] = [_doubled(one, known) for one in value]
    elif type(value) is tuple:
        return tuple(_doubled(one, known) for one in value)
    elif type(value) is dict:
        value.update({key: _doubled(one, known) for key, one in value.items()})
    return value


class _Doubles(TorchFunctionMode):
    """Double precision wherever the code asks for less, and no dropout, whose numbers depend on the width."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _TO_LESS:
            return args[0].double()
        name = getattr(func, "__name__", "")
        if name in _SINGLE:  # nothing but rounding is lost, and the planner does not look into them
            return convert(
                torch.float64, torch.float32, func(*convert(torch.float32, torch.float64, args), **(kwargs or {}))
            )
        if name in ("cfloat", "chalf"):
            return args[0].cdouble()
        if func in _DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        if func is F.scaled_dot_product_attention:
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "dropout_p"}
            args = args[:4] + (0.0,) * (len(args) > 4) + args[5:]
        args = tuple(_LESS.get(one, one) if isinstance(one, torch.dtype) else one for one in args)
        kwargs = {
            name: _LESS.get(one, one) if isinstance(one, torch.dtype) else one for name, one in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


_LESS = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64) | dict.fromkeys(
    (torch.complex32, torch.complex64), torch.complex128
)
_SINGLE = ("_grouped_mm", "_scaled_mm")  # have no kernel for double precision
_TO_LESS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)


def _random_parameter(name: str, parameter: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    if parameter.is_complex():
        values = torch.complex(*(_random(name, parameter.real, generator) for _ in range(2)))
    elif parameter.is_floating_point():
        values = _random(name, parameter, generator)
    else:
        values = parameter.detach().clone()
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _double(name: str, buffer: Tensor, generator: torch.Generator) -> Tensor:
    if "running_" in name and buffer.is_floating_point():
        return _random(name, buffer, generator)
    return _wide(buffer.detach())


def _wide(tensor: Tensor) -> Tensor:
    """A copy in double precision."""
    dtype = torch.complex128 if tensor.is_complex() else torch.float64 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(dtype, copy=True)


@contextmanager
def all_sliceable(model: nn.Module) -> Iterator[None]:
    """Torch's attention modules in the form that survives a cut."""
    undo = [make_sliceable(one) for one in model.modules() if type(one) is nn.MultiheadAttention]
    try:
        yield
    finally:
        for one in undo:
            one()


def doubles(example_inputs: ExampleInputs, *, noise: bool) -> ExampleInputs:
    """The example inputs in double precision, with noise of the values' own size: zeros would hide errors."""
    generator = torch.Generator().manual_seed(0)

    def change(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return _noisy(_wide(tensor), generator) if noise else _wide(tensor)

    tree = example_inputs if isinstance(example_inputs, Tensor | tuple) else dict(example_inputs)
    changed: ExampleInputs = tree_map_only(Tensor, change, tree)
    return changed


def _noisy(values: Tensor, generator: torch.Generator) -> Tensor:
    spread = float(values.std()) if values.numel() > 1 else 0.0
    if not math.isfinite(spread):
        return values
    noise = torch.randn(values.shape, dtype=values.dtype, generator=generator).to(values.device)
    return values + noise * (spread or 1.0)


def _random(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights of variance 1 / fan-in; scales and variances around 1, so that signals keep their size."""
    shape = tuple(tensor.shape)
    normal = torch.randn(shape, dtype=torch.float32, generator=generator).double()  # twice as fast as doubles
    if name.endswith(("running_var", "weight")) and len(shape) == 1:
        values = normal.abs_().clamp_(max=2).mul_(0.5).add_(0.5)
    elif len(shape) > 1:
        values = normal.mul_(max(tensor.numel() / max(shape[0], 1), 1) ** -0.5)  # there may be no entries
    else:
        values = normal.mul_(0.3)
    return values.to(tensor.device)
