"""Hooks that change the inputs of layers, and whose settings travel with the network's state dict.

forward        layer(x)  becomes  layer(change(x)); no module and no key of the state dict changes
state_dict()   the layer's record contains the hook's settings, as plain numbers
load           the hook of a layer takes the settings of the record; without a record it changes no input
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.core.hooks import Removable
from lightning_compress.core.records import RecordError, kind_class, shown
from lightning_compress.core.structure import Arriving, Structure, detach, structures


class NotScriptable:
    """A hook that torch.jit.script can't compile: the error is raised when the compiler asks for its `__name__`."""

    @property
    def __name__(self) -> str:
        raise AttributeError(
            "torch.jit.script can't compile a layer whose input is changed by a hook, as after quantization-aware "
            "training or with binary inputs: use torch.jit.trace or torch.export, which run the hook."
        )


class InputHook(NotScriptable, Structure):
    """A forward pre-hook that changes a layer's input. A subclass supplies `kind`, `change`, `record` and `take`."""

    rounds: ClassVar[bool] = True  # `core.evaluation.take_rounding_away` removes hooks with this mark
    name: str = ""  # of the layer, for error messages

    @classmethod
    def new(cls, module: nn.Module, name: str) -> InputHook:
        hook = cls()
        hook.name = name
        return hook

    @classmethod
    def when_lost(cls, model: nn.Module, names: list[str]) -> str | None:
        return (
            f"The weights that {type(model).__name__} has loaded were trained with quantized inputs, which the load "
            f"does not restore: the inputs of {', '.join(names)} stay real, and the outputs differ. Call "
            f"lightning_compress.core.structure.follow(model) before the load (for load_from_checkpoint in the "
            f"module's on_load_checkpoint), give trainer.test the callback that trained them, or use save_compressed "
            f"and load_compressed."
        )

    def change(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the input that the layer gets instead of x."""
        raise NotImplementedError(f"{type(self).__name__} must supply change().")

    def record(self) -> dict[str, Any] | None:
        """Return the settings of this hook as plain numbers; None while it changes no input."""
        raise NotImplementedError(f"{type(self).__name__} must supply record().")

    def take(self, record: Mapping[str, Any] | None) -> None:
        """Take the settings in the record of another hook; None: change no input."""
        raise NotImplementedError(f"{type(self).__name__} must supply take().")

    def settle(self, way: str) -> None:
        """Change inputs from now on as in one of the ways in which the network was run: see `answering.way_of`."""

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        return self.record()

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        try:
            kind_class(self.kind).new(module, self.name).take(record)  # type: ignore[attr-defined]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RecordError(
                f"The record of the inputs of {arriving.prefix.rstrip('.')!r} is not one that this version writes for "
                f"a {type(module).__name__}: {shown(record)} ({error!r:.60})."
            ) from error

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        if arriving.has_metadata:  # a copied state dict may have lost its metadata; the hook then stays as it is
            self.take(record)

    def attach(self, module: nn.Module) -> list[Removable]:
        """Register the hook on a layer, in the place of an earlier input hook."""
        take_away(module)
        _make_compiler_check_hooks()
        return [module.register_forward_pre_hook(self, with_kwargs=True), *super().attach(module)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        _make_compiler_check_hooks()

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not x.is_floating_point():  # as the forward of a user's own layer may allow
            raise ValueError(
                f"{type(layer).__name__} was called with {type(x).__name__ if not isinstance(x, Tensor) else x.dtype} "
                f"as its input, which can't be quantized: expected a floating-point tensor, as the first argument or "
                f"as `input`. Exclude the layer."
            )
        changed = self.change(layer, x)
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"input": changed})


def _make_compiler_check_hooks() -> None:
    """Make torch.compile check for hooks, and discard the code that it compiled without this check.

    By default it reuses the code of a network without hooks for every other network of the same class.
    """
    config = torch._dynamo.config
    if getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


class InputHooks:
    """Handle of the input hooks of several layers.

    Attributes:
        names: The qualified names of the layers.
    """

    def __init__(self, names: Sequence[str], handles: Sequence[Removable]) -> None:
        self.names = list(names)
        self._handles = list(handles)

    def remove(self) -> None:
        """Remove the hooks, so that the layers get their unchanged inputs again."""
        while self._handles:
            self._handles.pop().remove()


def input_hook(layer: nn.Module) -> InputHook | None:
    """Return the hook that changes this layer's input, or None."""
    return next((hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, InputHook)), None)


def settle_inputs(model: nn.Module, way: str) -> None:
    """Have all input hooks of a model do from now on what they did in one of the ways in which it was run."""
    for layer in model.modules():
        if (hook := input_hook(layer)) is not None:
            hook.settle(way)


def take_away(layer: nn.Module) -> None:
    """Remove the input hook of a layer, where it has one."""
    for one in structures(layer):
        if isinstance(one, InputHook):
            detach(layer, one)
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, InputHook) or isinstance(getattr(hook, "__self__", None), InputHook)
