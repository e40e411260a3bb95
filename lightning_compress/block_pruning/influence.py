"""How much a residual block changes what it reads: 1 - E cos(x, x + F(x)), the block influence of ShortGPT.

The cosine is that of one token's features, or, for maps of features, of a sample's whole maps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.block_pruning.plan import FEW, BlockError, without
from lightning_compress.channels.sandbox import doubles, sandbox
from lightning_compress.core.distributed import all_reduce_sum, rank
from lightning_compress.core.example_inputs import ExampleInputs, call, first_samples
from lightning_compress.core.hooks import Removable, hooked
from lightning_compress.core.outputs import run
from lightning_compress.core.precision import widened
from lightning_compress.stages.blocks import Block
from lightning_compress.stages.split import running

_EQUAL = 1e-9  # relative, in double precision
_TINY = 1e-30


class Sum(NamedTuple):
    """Where a network's sum x + F(x) is seen: what a module gets, or what it returns."""

    path: str
    side: Literal["gets", "returns"]


class Influence:
    """Measures the influence of blocks while a network runs, between `watch` and `stop`.

    Args:
        network: The network, which stays as it is.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first.
        blocks: Of the network.

    Attributes:
        sums: For each block the sum of 1 - cos over samples or tokens, and their number, in float64.

    Raises:
        BlockError: No module of the network gets or returns the sum of a block.
    """

    def __init__(self, network: nn.Module, example_inputs: ExampleInputs, blocks: Sequence[Block]) -> None:
        self._network = network
        self._blocks = list(blocks)
        self._places = _find_sums(network, example_inputs, blocks)
        self._handles: list[Removable] = []
        self._read: dict[str, Tensor] = {}  # what a block has read in this pass
        self.sums = torch.zeros(len(self._blocks), 2, dtype=torch.float64)

    def watch(self) -> None:
        """Measure what the network does from now on."""
        self.stop()
        # A network that drops blocks in training may see a sum in one pass, and what was read for it in another.
        self._handles.append(self._network.register_forward_pre_hook(lambda *_: self._read.clear()))
        for k, block in enumerate(self._blocks):
            self._handles.append(
                self._network.get_submodule(block.reads).register_forward_pre_hook(self._reads(block), with_kwargs=True)
            )
            place = self._places[block.name]
            module = self._network.get_submodule(place.path)
            if place.side == "gets":
                self._handles.append(module.register_forward_pre_hook(self._gets(k, block), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._returns(k, block)))

    def of(self, blocks: Sequence[Block]) -> Influence:
        """Return one for some of the blocks, which has measured nothing yet."""
        found = copy.copy(self)
        found._blocks, found._handles, found._read = list(blocks), [], {}
        found.sums = torch.zeros(len(found._blocks), 2, dtype=torch.float64)
        return found

    def gather(self) -> None:
        """Give the first rank the sums of all ranks, for a checkpoint; those of the others begin at zero."""
        total = self._total()
        self.sums = total if rank() == 0 else torch.zeros_like(total)

    def _total(self) -> Tensor:
        device = next((one.device for one in self._network.parameters()), self.sums.device)
        return all_reduce_sum(self.sums.to(device, copy=True)).cpu()

    def stop(self) -> None:
        """Measure nothing more."""
        while self._handles:
            self._handles.pop().remove()
        self._read.clear()

    def scores(self) -> dict[str, float]:
        """Return the influence of each block on the samples of all ranks, by name; NaN where nothing was measured."""
        total = self._total()
        means = total[:, 0] / total[:, 1]
        return {block.name: float(one) for block, one in zip(self._blocks, means, strict=True)}

    def _reads(self, block: Block) -> Any:
        def read(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._read[block.name] = _first((args, kwargs)).detach()

        return read

    def _gets(self, k: int, block: Block) -> Any:
        return lambda _module, args, kwargs: self._add(k, block, _first((args, kwargs)))

    def _returns(self, k: int, block: Block) -> Any:
        return lambda _module, _args, output: self._add(k, block, _first(output))

    @torch.no_grad()
    def _add(self, k: int, block: Block, total: Tensor) -> None:
        x = self._read.pop(block.name, None)
        if x is None or x.shape != total.shape:
            return
        x, total = widened(x), widened(total.detach())
        if x.dim() > 3:
            x, total = x.flatten(1), total.flatten(1)
        differing = 1 - _cosine(x, total)
        self.sums[k] += torch.tensor([float(differing.double().sum()), differing.numel()], dtype=torch.float64)


def block_influence(network: nn.Module, batches: Iterable[ExampleInputs], blocks: Sequence[Block]) -> dict[str, float]:
    """Return the influence of blocks on some batches, by name: 1 - E cos(x, x + F(x)).

    Args:
        network: The network, which runs in evaluation mode.
        batches: Inputs of the network, batch first.
        blocks: Of the network, as `find_blocks` returns them.
    """
    batches = list(batches)
    measured = Influence(network, batches[0], blocks)
    measured.watch()
    try:
        for batch in batches:
            with running(network):
                call(network, batch)
    finally:
        measured.stop()
    return measured.scores()


def _find_sums(network: nn.Module, example_inputs: ExampleInputs, blocks: Sequence[Block]) -> dict[str, Sum]:
    """Return where the sum of each block is seen: there x is seen when zeros are in the branch's place, and only then.

    Raises:
        BlockError: It is seen nowhere.
    """
    for block in blocks:
        if block.kind == "projection":
            raise BlockError(
                f"The influence of block {block.name!r} is not known, because its shortcut has layers of its own, so "
                f"that nothing says how much the block changes: use criterion='loss'."
            )
    found: dict[str, Sum] = {}
    with sandbox(network):
        inputs = doubles(first_samples(example_inputs, FEW), noise=True)
        for block in blocks:
            with without(network, [block]):
                places = _equal(network, inputs, block)
            always = set(_equal(network, inputs, block))
            place = next((one for one in places if one not in always), None)
            if place is None:
                raise BlockError(
                    f"The influence of block {block.name!r} can't be measured, because no module of "
                    f"{type(network).__name__} gets or returns the sum that it adds to: use criterion='loss'."
                )
            found[block.name] = place
    return found


def _equal(network: nn.Module, inputs: ExampleInputs, block: Block) -> list[Sum]:
    """Return where modules get or return what a block reads, once its branch has ended, in order."""
    read: list[Tensor] = []
    ended: list[bool] = []
    found: list[Sum] = []

    def reads(_module: nn.Module, args: Any, kwargs: Any) -> None:
        read.append(_first((args, kwargs)).clone())

    def compare(path: str, side: Literal["gets", "returns"], value: Any) -> None:
        tensor = next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)
        if not ended or not read or tensor is None or tensor.shape != read[-1].shape:
            return
        if float((tensor - read[-1]).abs().max()) <= _EQUAL * float(read[-1].abs().max()):
            found.append(Sum(path, side))

    def gets(path: str) -> Any:
        return lambda _module, args, kwargs: compare(path, "gets", (args, kwargs))

    def returns(path: str) -> Any:
        return lambda _module, _args, output: compare(path, "returns", output)

    handles: list[Removable] = []
    for path, module in network.named_modules():
        if path and not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(gets(path), with_kwargs=True))
            handles.append(module.register_forward_hook(returns(path)))
    handles.append(network.get_submodule(block.reads).register_forward_pre_hook(reads, with_kwargs=True, prepend=True))
    ends = network.get_submodule(block.ends)
    handles.append(ends.register_forward_hook(lambda *_: ended.append(True)))
    with hooked(*handles):
        run(network, inputs)
    return found


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosines of rows, also of tiny ones; two rows of zeros are alike."""
    large, larger = (rows.abs().amax(-1, keepdim=True) for rows in (one, other))
    cosine = F.cosine_similarity(one / large.clamp_min(_TINY), other / larger.clamp_min(_TINY), dim=-1)
    return torch.where((large + larger).squeeze(-1) == 0, 1.0, cosine)


def _first(value: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
