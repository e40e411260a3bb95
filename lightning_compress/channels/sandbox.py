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
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_compress.channels.attention import make_sliceable
from lightning_compress.channels.scripts import convert, scripts_callable
from lightning_compress.core.evaluation import (
    entries_restored,
    evaluating,
    modes_restored,
    random_state_restored,
    set_mode,
    take_rounding_away,
)
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.side_outputs import side_outputs
from lightning_compress.core.tensors import named_tensors


@contextmanager
def sandbox(model: nn.Module) -> Iterator[None]:
    """Give a network random parameters, double precision and evaluation mode in the block, and restore it afterwards.

    Then every branch of the network changes the outputs, even behind a tiny layer scale or a norm whose scale begins at
    zero, and every difference is either tiny or an error.
    """
    generator = torch.Generator().manual_seed(0)
    # New tensors take the place of the network's, because a new dtype would drop hooks, such as those of
    # DistributedDataParallel.
    others: dict[int, Tensor] = {
        id(one): _random_parameter(name, one, generator) for name, one in model.named_parameters()
    }
    others |= {id(one): _double(name, one, generator) for name, one in model.named_buffers()}
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    with ExitStack() as back:
        back.enter_context(_old_objects_left_alone())
        back.callback(_let_go, others.values())
        back.enter_context(torch.compiler.set_stance("force_eager"))
        # torch below 2.7 refuses to trace compiled modules, although force_eager calls the original ones.
        back.enter_context(torch._dynamo.config.patch(error_on_nested_fx_trace=False))
        back.enter_context(random_state_restored(model))
        back.enter_context(torch.no_grad())
        back.enter_context(entries_restored(model))
        for table in tables:  # entries_restored does not restore the tables of scripted modules
            back.callback(_fill, table, dict(table.items()))
        back.callback(torch.set_default_dtype, torch.get_default_dtype())
        take_rounding_away(model)
        for table in tables:
            _fill(table, {name: others.get(id(one), one) for name, one in table.items()})
        for module in model.modules():
            _double_attributes(vars(module), others)
            if isinstance(module, _NormBase) and module.momentum is None:
                module.momentum = 0.1  # no export can follow the count of batches, on which no output depends
        for context in (modes_restored(model), all_sliceable(model), scripts_callable(model), _Doubles()):
            back.enter_context(context)
        torch.set_default_dtype(torch.float64)  # for constants that the network's code makes
        set_mode(model, True)
        set_mode(model, False)  # in two steps, so that modules renew the weights that they cache for evaluation
        yield


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Restrict Python's frequent garbage collections to new objects, because torch alone has a million old ones."""
    if gc.get_freeze_count():  # the user's own code has frozen objects
        yield
        return
    gc.collect(1)  # else garbage among young objects would be frozen, too
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _let_go(tensors: Iterable[Tensor]) -> None:
    """Free the tensors' memory now; torch.export refers to them in cycles, which are collected much later."""
    for tensor in tensors:
        tensor.data = tensor.data.new_empty(0)


def _fill(table: Any, values: dict[str, Any]) -> None:
    """Write what differs into a module's table of parameters or buffers; scripted modules take no new names."""
    for name, value in values.items():
        if table[name] is not value:
            table[name] = value


def _double_attributes(entries: dict[str, Any], known: Mapping[int, Tensor]) -> None:
    """Replace the tensors among a module's attributes, also in its dicts and lists, by copies in double precision.

    `known` has the copies of parameters and buffers by the id of the original.
    """
    for name, value in list(entries.items()):
        if name not in ("_parameters", "_buffers", "_modules") and isinstance(value, Tensor | list | tuple | dict):
            entries[name] = _doubled(value, known)


def _doubled(value: Any, known: Mapping[int, Tensor]) -> Any:
    if isinstance(value, nn.Parameter):  # recurrent layers keep a list of their parameters
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
    """Uses double precision where the code asks for less, and skips dropout, whose numbers depend on the width."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _TO_LESS:
            return args[0].double()
        name = getattr(func, "__name__", "")
        if name in _SINGLE:
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
_SINGLE = ("_grouped_mm", "_scaled_mm")  # operators without a kernel for double precision
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
    """Return a copy in double precision."""
    dtype = torch.complex128 if tensor.is_complex() else torch.float64 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(dtype, copy=True)


@contextmanager
def all_sliceable(model: nn.Module) -> Iterator[None]:
    """Turn torch's attention modules in the block into ones that can be cut."""
    undo = [make_sliceable(one) for one in model.modules() if type(one) is nn.MultiheadAttention]
    try:
        yield
    finally:
        for one in undo:
            one()


def doubles(example_inputs: ExampleInputs, *, noise: bool) -> ExampleInputs:
    """Return the example inputs in double precision; noise of the values' size shows errors that zeros would hide."""
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
    """Return random weights of variance 1 / fan-in, or scales and variances around 1: signals keep their size."""
    shape = tuple(tensor.shape)
    normal = torch.randn(shape, dtype=torch.float32, generator=generator).double()  # twice as fast as doubles
    if name.endswith(("running_var", "weight")) and len(shape) == 1:
        values = normal.abs_().clamp_(max=2).mul_(0.5).add_(0.5)
    elif len(shape) > 1:
        values = normal.mul_(max(tensor.numel() / max(shape[0], 1), 1) ** -0.5)  # there may be no entries
    else:
        values = normal.mul_(0.3)
    return values.to(tensor.device)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run forward passes in the block without torch.compile and torch.autocast, and undo all that they change."""
    with ExitStack() as stack:
        for device in {tensor.device.type for tensor in named_tensors(model).values()} & {"cpu", "cuda", "mps", "xpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))  # it caches weights
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(side_outputs(model))
        stack.enter_context(entries_restored(model))
        stack.enter_context(evaluating(model))
        take_rounding_away(model)
        yield
