"""Hooks that change what layers of the user's own network see, and that travel with its state dict.

    forward        layer(x)  becomes  layer(change(x)); no module and no key of the state dict changes
    state_dict()   the layer's entry of the metadata has the hook's record: a kind, and plain numbers
    load           a layer with a hook takes the record that comes, or none where the network was saved without

Metadata survive checkpoints of weights alone, compressed files and a strict load into the plain class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

INPUTS = "lightning_compress.inputs"  # the key in the metadata of a layer

_NEXT = "next_handle"  # in the state of a pickled hook


class NotScriptable:
    """A hook that torch.jit.script does not compile, and which says so: torch asks every hook for its name."""

    @property
    def __name__(self) -> str:
        raise AttributeError(
            "torch.jit.script can't compile a layer whose input is changed by a hook, as after quantization-aware "
            "training or with binary inputs: use torch.jit.trace or torch.export, which run the hook."
        )


class InputHook(NotScriptable):
    """A forward pre-hook that changes a layer's input. A subclass supplies `kind`, `change`, `record` and `take`."""

    kind: ClassVar[str]
    rounds: ClassVar[bool] = True  # for core, which takes it away where it looks at channels
    name: str = ""  # of the layer, for messages

    def change(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return what the layer sees in the place of x."""
        raise NotImplementedError

    def record(self) -> dict[str, Any] | None:
        """Return plain numbers that `take` needs to do the same elsewhere; None if nothing is done to inputs."""
        raise NotImplementedError

    def take(self, record: Mapping[str, Any] | None) -> None:
        """Do what the record of another hook of this kind says."""
        raise NotImplementedError

    def attach(self, layer: nn.Module) -> list[RemovableHandle]:
        """Put the hook on a layer, in the place of one that was there."""
        take_away(layer)
        _have_compilation_see_hooks()
        return [
            layer.register_forward_pre_hook(self, with_kwargs=True),
            layer.register_state_dict_post_hook(_OnSave(self)),  # type: ignore[no-untyped-call]
            layer.register_load_state_dict_pre_hook(_OnLoad(self)),  # type: ignore[no-untyped-call]
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {_NEXT: RemovableHandle.next_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickled network keeps torch's numbers for its hooks, which a new process would give to others.
        RemovableHandle.next_id = max(RemovableHandle.next_id, state[_NEXT])
        self.__dict__ |= {key: value for key, value in state.items() if key != _NEXT}
        _have_compilation_see_hooks()

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not x.is_floating_point():  # a layer of the user's own, with its own forward
            raise ValueError(
                f"{type(layer).__name__} was called with {type(x).__name__ if not isinstance(x, Tensor) else x.dtype} "
                f"as its input, which has no form of few bits: it must be a tensor of floats, the first argument or "
                f"`input`. Exclude the layer."
            )
        changed = self.change(layer, x)
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"input": changed})


def _have_compilation_see_hooks() -> None:
    """Have torch.compile look at hooks, and drop what it has compiled without.

    By default it takes the code of a network without hooks for every other network of the same class.
    """
    config = torch._dynamo.config
    if getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


class _OnSave:
    def __init__(self, owner: InputHook) -> None:
        self.owner = owner

    def __call__(self, layer: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
        if (record := self.owner.record()) is not None:
            local_metadata[INPUTS] = {"kind": self.owner.kind} | record


class _OnLoad:
    def __init__(self, owner: InputHook) -> None:
        self.owner = owner

    def __call__(
        self, layer: nn.Module, state_dict: Any, prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        if local_metadata:  # a copy of a state dict may have lost it, which says nothing
            record = local_metadata.get(INPUTS)
            self.owner.take(record if record and record["kind"] == self.owner.kind else None)


class InputHooks:
    """What has been put on layers; `remove` takes it away.

    Attributes:
        names: The layers.
    """

    def __init__(self, names: Sequence[str], handles: Sequence[RemovableHandle]) -> None:
        self.names = list(names)
        self._handles = list(handles)

    def remove(self) -> None:
        """Let the layers see their real inputs again."""
        while self._handles:
            self._handles.pop().remove()


def input_hook(layer: nn.Module) -> InputHook | None:
    """Return the hook that changes this layer's input, or None."""
    return next((hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, InputHook)), None)


def take_away(layer: nn.Module) -> None:
    """Let a layer see its real input again."""
    for hooks in (
        layer._forward_pre_hooks,
        layer._forward_hooks,
        layer._state_dict_hooks,
        layer._load_state_dict_pre_hooks,
    ):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_ours(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # torch wraps those of a load
    return isinstance(hook, InputHook | _OnSave | _OnLoad) or isinstance(getattr(hook, "__self__", None), InputHook)
