"""Networks whose layers see other inputs than they were given, from a file into a fresh module of the user's class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.input_hooks import INPUTS, InputHook, input_hook
from lightning_compress.core.record_error import RecordError

_KINDS = {  # where the hook of each kind is, which is imported when a state dict has one
    "grid": "lightning_compress.quantization.input_grids.InputQuantizer",
    "sign": "lightning_compress.binary.inputs.BinaryInput",
}


def _hook_class(kind: str) -> type[InputHook]:
    module, _, name = _KINDS[kind].rpartition(".")
    found: type[InputHook] = getattr(import_module(module), name)
    return found


class _OnLoad:
    """Puts hooks on the layers that had some when the state dict was made; these then take their records."""

    def __call__(self, model: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, kind in _changed(state_dict, prefix).items():
            if kind not in _KINDS:
                raise ValueError(f"The inputs of {name} were changed in a way that this version does not know: {kind}.")
            layer = model.get_submodule(name)
            if not isinstance(input_hook(layer), _hook_class(kind)):
                hook = _hook_class(kind)()
                hook.name = name
                hook.attach(layer)


def _changed(state_dict: Any, prefix: str = "") -> dict[str, str]:
    """Return the layers of the module at `prefix` that saw other inputs when a state dict was made, and which kind."""
    entries = {f"{path}.": entry for path, entry in (getattr(state_dict, "_metadata", None) or {}).items()}
    return {
        path[len(prefix) : -1]: entry[INPUTS]["kind"]
        for path, entry in entries.items()
        if INPUTS in entry and path.startswith(prefix)
    }


def check_inputs(model: nn.Module, state_dict: Any) -> None:
    """Refuse what a state dict says of inputs if no hook of ours has written it; nothing changes.

    Raises:
        RecordError: A layer is not there, or a number is missing, of another type or out of range.
    """
    layers = dict(model.named_modules())
    for path, entry in (getattr(state_dict, "_metadata", None) or {}).items():
        if INPUTS not in entry:
            continue
        record = entry[INPUTS]
        try:
            _hook_class(record["kind"])().take(record)
            layers[path]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RecordError(
                f"The record of the inputs of {path!r} is none of {type(model).__name__} in this version: "
                f"{record!r:.60} ({error!r:.60})."
            ) from error


def _warn_where_inputs_are_lost() -> None:
    """Have every load of a state dict warn where layers saw other inputs when it was made, and do not any more.

    A class of the user's own, as in `load_from_checkpoint`, has nothing else of ours that could say it.
    """
    load = nn.Module.load_state_dict

    @wraps(load)
    def load_and_look(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = load(module, state_dict, *args, **kwargs)
        layers = dict(module.named_modules())
        hooks = {
            name: (kind, input_hook(layers[name])) for name, kind in _changed(state_dict).items() if name in layers
        }
        if lost := [name for name, (kind, hook) in hooks.items() if hook is None or hook.kind != kind]:
            warnings.warn(
                f"The weights that {type(module).__name__} has loaded were trained with inputs of few bits, which this "
                f"load does not bring along: the inputs of {', '.join(lost)} stay real, and the outputs differ. Call "
                f"lightning_compress.core.input_records.follow_inputs(model) before the load (for "
                f"load_from_checkpoint in the module's on_load_checkpoint), give trainer.test the callback that trained"
                f" them, or use save_compressed and load_compressed.",
                stacklevel=2,
            )
        return result

    nn.Module.load_state_dict = load_and_look  # type: ignore[assignment,method-assign]


_warn_where_inputs_are_lost()


def follow_inputs(model: nn.Module) -> RemovableHandle | None:
    """Make what is loaded into a model bring its changed inputs along.

    Returns:
        What undoes it; None if it had been done before.
    """
    if any(isinstance(getattr(hook, "hook", hook), _OnLoad) for hook in model._load_state_dict_pre_hooks.values()):
        return None
    handle: RemovableHandle = model.register_load_state_dict_pre_hook(_OnLoad())  # type: ignore[no-untyped-call]
    return handle


@contextmanager
def following_inputs(model: nn.Module) -> Iterator[None]:
    """As `follow_inputs`, for what is loaded within the block.

    Example:
        >>> from lightning_compress.quantization.input_grids import InputGrid, input_grids, quantize_inputs
        >>> net, fresh = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        >>> _ = quantize_inputs(net, {"0": InputGrid(0.5, 0, 8)})
        >>> with following_inputs(fresh):
        ...     fresh.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> input_grids(fresh)
        {'0': InputGrid(scale=0.5, zero_point=0, bits=8)}
    """
    handle = follow_inputs(model)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
