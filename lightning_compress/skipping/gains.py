"""What it saves to skip blocks, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.skipping.gates import SkipGates
from lightning_compress.skipping.program import Program
from lightning_compress.skipping.run import Run
from lightning_compress.stages.live import Live

_ROUNDS = 5


def gains(
    program: Program,
    live: Live,
    gates: SkipGates,
    inputs: Sequence[Tensor],
    rates: Sequence[float],
    fixed: Mapping[int, bool],
) -> dict[int, float]:
    """Return for each block the share of the network's time that is saved where a share of the samples skips it.

    A policy is computed for all blocks together. If it takes longer than they save, none saves anything.

    Args:
        program: Of the network.
        live: Has its weights.
        gates: Of the blocks.
        inputs: A batch.
        rates: The share of the samples that run each block.
        fixed: Blocks that no gate decides for.
    """
    timing = _Timing(program, live, gates, rates, fixed)
    weights = live.tensors(program.trunk)
    program.trunk.module.forward(timing, *inputs, *weights)
    ones = torch.ones(1, max(program.blocks, default=0) + 1, dtype=torch.bool, device=inputs[0].device)

    def whole() -> Any:
        run = Run(program.blocks, live.tensors, gates, forced=ones.expand(inputs[0].shape[0], -1))
        return program.trunk.module.forward(run, *inputs, *weights)

    full = least_seconds(whole, inputs[0])
    total = sum(saved for saved in timing.saved.values() if saved > 0)
    if timing.policy > total:
        return {k: min(saved, 0.0) / full - timing.policy / full for k, saved in timing.saved.items()}
    return {k: saved / full for k, saved in timing.saved.items()}


class _Timing(Run):
    """Times each block for all samples, and for a share of them with its gate, and runs it for all."""

    def __init__(
        self, program: Program, live: Live, gates: SkipGates, rates: Sequence[float], fixed: Mapping[int, bool]
    ) -> None:
        super().__init__(program.blocks, live.tensors, gates, fixed=fixed)
        self.rates = rates
        self.saved: dict[int, float] = {}
        self.policy = 0.0

    def block(self, k: int, shortcut: Tensor, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        samples = shortcut.shape[0]
        number = min(max(round(self.rates[k] * samples), 1), samples)
        index = torch.randperm(samples, generator=torch.Generator().manual_seed(k))[:number].sort().values
        index = index.to(shortcut.device)
        scratch, state = shortcut.clone(), self._state
        part = self.blocks[k]

        def gate() -> None:
            logit, self._state = self.gates.logit(k, x, state)
            (logit > 0).nonzero()

        if k not in self.fixed:
            full = least_seconds(lambda: self.added(part, scratch, inputs, True), shortcut)
            some = least_seconds(lambda: self.added(part, scratch, inputs, index), shortcut)
            decided = 0.0 if self.gates.kind == "policy" else least_seconds(gate, shortcut)
            self.saved[k] = full - some - decided
        elif self.gates.kind == "recurrent":
            gate()
        return self.added(part, shortcut, inputs, self.fixed.get(k, True))

    def sort(self, x: Tensor, sortable: bool) -> None:
        def decide() -> None:
            _, logits = self.gates.logit(0, x, None)
            (logits > 0).cpu()

        self.policy = least_seconds(decide, x)


def least_seconds(run: Callable[[], Any], like: Tensor) -> float:
    """Return the least time of a few calls, after one that warms up."""
    run()
    times = []
    for _ in range(_ROUNDS):
        start = _now(like)
        run()
        times.append(_now(like) - start)
    return min(times)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
