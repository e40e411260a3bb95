"""Networks whose layers see other inputs than they were given, from a file into a fresh module of the user's class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.quantization.binary_inputs import BinaryInput
from lightning_compress.quantization.input_grids import InputQuantizer
from lightning_compress.quantization.input_hooks import INPUTS, InputHook, input_hook

_KINDS: Mapping[str, type[InputHook]] = {kind.kind: kind for kind in (InputQuantizer, BinaryInput)}


class _OnLoad:
    """Puts hooks on the layers that had some when the state dict was made; these then take their records."""

    def __call__(self, model: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        for path, entry in getattr(state_dict, "_metadata", {}).items():
            if INPUTS not in entry or not f"{path}.".startswith(prefix):
                continue
            name, kind = f"{path}."[len(prefix) : -1], entry[INPUTS]["kind"]
            if kind not in _KINDS:
                raise ValueError(f"The inputs of {name} were changed in a way that this version does not know: {kind}.")
            layer = model.get_submodule(name)
            if not isinstance(input_hook(layer), _KINDS[kind]):
                hook = _KINDS[kind]()
                hook.name = name
                hook.attach(layer)


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
