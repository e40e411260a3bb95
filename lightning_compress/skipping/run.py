"""One batch on its way through a network whose blocks run for some of the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_compress.skipping.gates import SkipGates

if TYPE_CHECKING:
    from lightning_compress.skipping.program import BlockPart
    from lightning_compress.stages.extract import Rows, Stage

Who = Tensor | slice | bool  # their positions in the batch; True: all, False: nobody


class Run:
    """A batch on its way through a network.

    Args:
        blocks: The parts of the network that run for some of the samples.
        tensors: Returns the weights of a part.
        gates: Decide who runs which block.
        fixed: Blocks that run for all or for nobody, whatever their gates say.
        forced: Decisions in the gates' place, (N, K).
        record: Keep the decisions.
    """

    def __init__(
        self,
        blocks: Mapping[int, BlockPart],
        tensors: Callable[[Stage], list[Tensor]],
        gates: SkipGates,
        *,
        fixed: Mapping[int, bool] | None = None,
        forced: Tensor | None = None,
        record: bool = False,
    ) -> None:
        self.blocks, self.tensors, self.gates = blocks, tensors, gates
        self.fixed, self.forced, self.record = fixed or {}, forced, record
        self.decided: dict[int, Who] = {}
        self.order: Tensor | None = None  # of the samples in the sorted batch
        self._state: Any = None
        self._plan: dict[int, Who] | None = None
        self._may_write = not torch.is_grad_enabled()

    def block(self, k: int, shortcut: Tensor, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Return the sum of block k."""
        part = self.blocks[k]
        who = self._who(k, x)
        if self.record:
            self.decided[k] = who
        return self.added(part, shortcut, inputs, who)

    def added(self, part: BlockPart, shortcut: Tensor, inputs: Sequence[Tensor], who: Who) -> Tensor:
        """Return a block's sum, in which some of the samples have run it."""
        may_write = part.in_place and self._may_write
        if who is False:
            return shortcut.clone() if part.in_place and not may_write else shortcut
        if who is not True:
            inputs = [_taken(one, rows, who) for one, rows in zip(inputs, part.rows, strict=True)]
        found: Tensor = part.stage.module.forward(*inputs, *self.tensors(part.stage))
        if who is True:
            return shortcut.add_(found) if may_write else shortcut + found
        result = shortcut if may_write else shortcut.clone()
        if isinstance(who, slice):
            result[who].add_(found)
        else:
            result.index_add_(0, who, found.to(result.dtype))
        return result

    def _who(self, k: int, x: Tensor) -> Who:
        if self._plan is not None:
            return self._plan[k]
        if self.forced is not None:
            runs = self.forced[:, k]
        else:
            logit, self._state = self.gates.logit(k, x, self._state)
            if k in self.fixed:
                return self.fixed[k]
            runs = logit > 0
        if len(runs) == 1:
            return bool(runs)
        index = runs.nonzero().view(-1)
        if len(index) == len(runs):
            return True
        return index if len(index) else False

    def sort(self, x: Tensor, sortable: bool) -> None:
        """Decide for all blocks at once, with one wait for the device, and order the batch by the decisions."""
        if self.forced is None:
            _, logits = self.gates.logit(0, x, None)
            runs = (logits > 0).cpu().numpy()
        else:
            runs = self.forced.cpu().numpy()
        samples = len(runs)
        ks = list(self.blocks)
        runs = runs[:, ks]
        counts = runs.sum(0)
        mixed = (counts > 0) & (counts < samples)
        if sortable and samples > 1 and mixed.any():
            order = np.lexsort(runs.T[::-1])
            moved = runs[order]
            if _saved(moved, counts, mixed) > samples:
                self.order = torch.from_numpy(order).to(x.device)
                runs = moved
        self._plan = {}
        for i, k in enumerate(ks):
            if not mixed[i]:
                self._plan[k] = bool(counts[i])
                continue
            index = runs[:, i].nonzero()[0]
            if index[-1] - index[0] + 1 == counts[i]:
                self._plan[k] = slice(int(index[0]), int(index[-1]) + 1)
            else:
                self._plan[k] = torch.from_numpy(index).to(x.device)

    def unsorted(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return a tensor of the sorted batch in the order of the input."""
        if self.order is None:
            return tensor
        return torch.empty_like(tensor).index_copy_(dim, self.order, tensor)

    def decisions(self, samples: int, blocks: int, device: torch.device, always: Sequence[int]) -> Tensor:
        """Return who ran which block, (N, K)."""
        found = torch.zeros(samples, blocks, dtype=torch.bool, device=device)
        for k in always:
            found[:, k] = True
        for k, who in self.decided.items():
            if who is True:
                found[:, k] = True
            elif who is not False:
                found[who, k] = True
        return self.unsorted(found)


def _saved(runs: Any, counts: Any, mixed: Any) -> int:
    """Return how many samples need not be gathered at a block, because they are neighbours."""
    first, last = runs.argmax(0), len(runs) - 1 - runs[::-1].argmax(0)
    neighbours: Any = mixed & (last - first + 1 == counts)
    return int((counts * neighbours).sum())


def _taken(tensor: Tensor, rows: Rows | None, who: Tensor | slice) -> Tensor:
    if rows is None:
        return tensor
    if isinstance(who, Tensor):
        return rows.take(tensor, who)
    if rows.each == 1:
        return tensor.narrow(rows.dim, who.start, who.stop - who.start)
    return rows.take(tensor, torch.arange(who.start, who.stop, device=tensor.device))


def run_block(run: Run, k: int, shortcut: Tensor, x: Tensor, *inputs: Tensor) -> Tensor:
    """Return the sum of a block; called by the trunk."""
    return run.block(k, shortcut, x, inputs)


def sort_batch(run: Run, x: Tensor, sortable: bool) -> None:
    """Have all decisions be made; called by the trunk before the first block."""
    run.sort(x, sortable)


def sorted_by_policy(run: Run, tensor: Tensor, dim: int) -> Tensor:
    """Return a tensor in the order of the sorted batch; called by the trunk."""
    return tensor if run.order is None else tensor.index_select(dim, run.order)
