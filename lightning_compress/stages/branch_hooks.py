"""Hooks that multiply the branches of residual blocks by factors per sample, decided from what the blocks read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.hooks import unhook
from lightning_compress.stages.block import Block
from lightning_compress.stages.trace import first_tensor

Decide = Callable[[int, Tensor], Tensor | None]


def gated(
    network: nn.Module, blocks: Sequence[Block], decide: Decide, begin: Callable[[], None] | None = None
) -> tuple[RemovableHandle, ...]:
    """Have factors multiply the branches of blocks in every forward pass, until the handles are removed.

    Args:
        network: Has the blocks, and gets two hooks for each. A copy of it has hooks of its own, which call a copy of
            `decide` where that is a method of a module in the network.
        blocks: What `find_blocks` found.
        decide: Called with the number of a block and what it reads, when it reads it. Returns one factor for each
            sample, by which the end of the branch is multiplied in the same pass; None: the branch stays as it is.
        begin: Called whenever the network is called: a network that drops blocks in training, and runs twice in a step,
            reads blocks of another pass in an order that says nothing of it.

    Example:
        >>> import torch
        >>> from lightning_compress.stages.blocks import find_blocks
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.layer(x)
        >>> network, x = Residual(), torch.randn(3, 4)
        >>> blocks = find_blocks(network, x).blocks
        >>> handles = gated(network, blocks, lambda k, x: torch.zeros(len(x)))
        >>> torch.equal(network(x), x)
        True
    """
    handles = []
    for k, block in enumerate(blocks):
        gate = _Gate(k, block, decide)
        reads, ends = network.get_submodule(block.reads), network.get_submodule(block.ends)
        handles.append(reads.register_forward_pre_hook(gate.read, with_kwargs=True, prepend=True))
        handles.append(ends.register_forward_hook(gate.multiply))
    if begin is not None:
        handles.append(network.register_forward_pre_hook(_Begin(begin), prepend=True))
    return tuple(handles)


def ungate(network: nn.Module) -> None:
    """Take all hooks of `gated` away from a network, which may be a copy."""
    unhook(network, lambda hook: isinstance(hook, _Begin) or isinstance(getattr(hook, "__self__", None), _Gate))


class _Begin:
    """The hook of a network that says that a pass begins, unless gradients compute one again."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        if not in_backward():
            self.begin()


class _Gate:
    """The hooks of a block, which keep the factors of the last pass for layers that gradients compute again."""

    def __init__(self, k: int, block: Block, decide: Decide) -> None:
        self.k, self.block, self.decide = k, block, decide
        self.factors: Tensor | None = None

    def read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor((*args, *kwargs.values()))
        if x is None:
            raise ValueError(f"{self.block.reads} got no tensor, which the block {self.block.name!r} reads there.")
        self.factors = self.decide(self.k, x)
        if self.factors is not None and self.factors.shape != x.shape[:1]:
            raise ValueError(
                f"The factors of block {self.block.name!r} have shape {tuple(self.factors.shape)}: "
                f"pass one for each of the {x.shape[0]} samples."
            )

    def multiply(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        factors = self.factors
        if factors is None:
            return None
        if isinstance(output, Tensor):
            return _times(output, factors)
        leaves, spec = tree_flatten(output)
        at = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[at] = _times(leaves[at], factors)
        return tree_unflatten(leaves, spec)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"factors": None}


def in_backward() -> bool:
    """Return whether gradients are being computed, as where a checkpoint of activations runs layers again."""
    return torch._C._current_graph_task_id() != -1


def _times(output: Tensor, factors: Tensor) -> Tensor:
    return output * factors.to(output.dtype).view(-1, *(1,) * (output.dim() - 1))
