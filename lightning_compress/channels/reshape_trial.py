"""Find the reshapes in a module's code that a cut makes fail, and the sizes that they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.channels.groups import Attribute
from lightning_compress.channels.reshapes import (
    RESHAPES,
    Adapted,
    Pattern,
    Sizes,
    corrected,
    may_miss,
    sizes_asked,
    sizes_left,
)
from lightning_compress.core.hooks import hooked


class Seen:
    """A reshape in a module's dense code.

    Attributes:
        takes: Number of dimensions of its input.
        shape: Shape of its result.
        nodes: By dimension of the result, the nodes along it.
    """

    def __init__(self, takes: int, shape: Sizes, nodes: Mapping[int, Tensor]) -> None:
        self.takes, self.shape, self.nodes = takes, shape, nodes


class Solving(TorchFunctionMode):
    """Gives reshapes that fail in a thin network the sizes that the graph shows to be left, and collects them.

    Args:
        model: The network.
        seen: By module the reshapes in its dense code.
        removed: By node whether it is cut.

    Attributes:
        needed: By module and pattern the reshapes that failed.
    """

    def __init__(self, model: nn.Module, seen: Mapping[str, Sequence[Seen]], removed: Tensor) -> None:
        super().__init__()
        self._model, self._seen, self._removed = model, seen, removed
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[nn.Module] = []
        self.needed: dict[tuple[str, Pattern], Seen] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Correct reshapes in the block, in whichever module they are called."""

        def enter(module: nn.Module, _args: Any) -> None:
            self._stack.append(module)

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            self._stack.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        Adapted.solved_by_trial = True
        try:
            with hooked(*handles), self:
                yield
        finally:
            Adapted.solved_by_trial = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in RESHAPES and not kwargs and (sizes := sizes_asked(args[1:])) and may_miss(args[0], sizes):
            args = args[0], self._solved(args[0], sizes)
        return func(*args, **(kwargs or {}))

    def _solved(self, tensor: Tensor, asked: Sizes) -> Sizes:
        module = self._stack[-1] if self._stack else self._model
        path = self._paths.get(id(module), "")
        found: dict[Sizes, tuple[Pattern, Seen]] = {}
        for one in self._seen.get(path, ()):
            if module is self._model or one.takes != tensor.dim() or len(one.shape) != len(asked):
                continue
            full = torch.empty([math.prod(one.shape), *[1] * (one.takes - 1)], device="meta")
            before = corrected(asked, sizes_left(module), full)  # the sizes before this cut
            if any(a not in (-1, b) for a, b in zip(before, one.shape, strict=True)):
                continue
            gone = {dim: int(self._removed[nodes].sum()) for dim, nodes in one.nodes.items()}
            there = tuple(size - gone.get(dim, 0) for dim, size in enumerate(one.shape))
            cut = [size if gone.get(dim, 0) and size >= 0 else -1 for dim, size in enumerate(asked)]
            if math.prod(there) == tensor.numel():
                found[there] = Pattern(one.takes, tuple(cut)), one
        if len(found) != 1:
            return corrected(asked, sizes_left(module), tensor)
        ((there, (pattern, one)),) = found.items()
        if max(pattern.sizes) >= 0:
            self.needed[path, pattern] = one
        return there


def attributes_needed(needed: Mapping[tuple[str, Pattern], Seen], channel_of: Tensor, size: int) -> list[Attribute]:
    """Return the reshapes that failed as attributes of a group.

    Args:
        needed: `Solving.needed`.
        channel_of: By node the number of its channel in the group, -1 for nodes of other groups.
        size: Number of channels in the group.
    """
    found = []
    for (module, pattern), one in needed.items():
        for dim in (dim for dim, asked in enumerate(pattern.sizes) if asked >= 0):
            channels = channel_of[one.nodes[dim]]
            each = torch.bincount(channels[channels >= 0], minlength=size)
            if int(each.min()) == int(each.max()):
                order = torch.argsort(channels, stable=True)[int((channels < 0).sum()) :]
                found.append(Attribute(module, pattern.name, dim, order.reshape(size, -1)))
    return found
