"""Call single modules of a network with the arguments that they got in a run of the whole, to find crashes early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.groups import Drop
from lightning_compress.channels.removal import silenced, take
from lightning_compress.channels.slicing import Slices
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.hooks import hooked
from lightning_compress.core.outputs import TOLERANCE, alike, compare, run


class Calls:
    """The first call of every module in one forward pass.

    Args:
        model: The network, which runs once.
        example_inputs: The inputs of this run.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        self._model = model
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        handles = [
            module.register_forward_hook(self._recorder(name), with_kwargs=True)
            for name, module in model.named_modules(remove_duplicate=False)
            if not isinstance(module, torch.jit.ScriptModule)  # scripts take no hooks
        ]
        with hooked(*handles):
            run(model, example_inputs)

    def crash(self, drop: Drop) -> str | None:
        """Cut, and call the smallest module around the cut tensors; return None, or the error of its code."""
        thin = without(
            self._model, drop, self._around([member.tensor for group, _ in drop for member in group.members])
        )
        return thin if isinstance(thin, str) else None

    def difference(self, drop: Drop) -> str | None:
        """Return the error as `crash` does, or where the output differs from that of the dense module with zeros."""
        part = self._around([member.tensor for group, _ in drop for member in group.members])
        thin = without(self._model, drop, part)
        if isinstance(thin, str) or not all(group.exact for group, _ in drop):
            return thin if isinstance(thin, str) else None
        with silenced(self._model, drop, in_place=True):
            try:
                expected = part()
            except Exception as error:  # the network's code may raise anything
                return f"there is nothing to compare with ({error})"[:200]
        return compare(thin, expected, TOLERANCE)

    def _recorder(self, name: str) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            self._calls.setdefault(name, (args, kwargs))

        return record

    def _around(self, names: Sequence[str]) -> Callable[[], list[Tensor]]:
        """Return a function that calls the smallest module around some tensors with the arguments of its first call."""
        paths = [name.split(".")[:-1] for name in names]
        common = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        if common and not any(True for _ in self._model.get_submodule(".".join(common)).children()):
            common.pop()  # a single layer returns its channels: the module around it must survive
        while ".".join(common) not in self._calls:  # containers are never called, and the network was
            common.pop()
        module, (args, kwargs) = self._model.get_submodule(".".join(common)), self._calls[".".join(common)]

        return lambda: alike(module, lambda: module(*args, **kwargs))


def without(model: nn.Module, drop: Drop, forward: Callable[[], list[Tensor]]) -> list[Tensor] | str:
    """Call `forward` while some channels are cut out of the model, which is in the sandbox.

    Returns:
        Its result, or the message of the error that the network's code raised.
    """
    slices = Slices(sparing=True)
    try:
        take(slices, model, drop)
        return forward()
    except Exception as error:  # the network's code may raise anything
        return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
    finally:
        slices.undo()
