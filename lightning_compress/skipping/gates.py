"""Gates: they decide for each sample which residual blocks of a network run.

    s = x + g F(x)        g = 1 where the gate's logit l(x) > 0, else 0

In training the gradient of g is that of sigmoid(l / T), the straight-through estimator. Where decisions are drawn, g is
1 with the probability sigmoid(l), and has the gradient of sigmoid((l + noise) / T); in evaluation nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.hooks import hooked
from lightning_compress.skipping.gate_modules import BlockGate, Features, PolicyGate, RecurrentGate
from lightning_compress.stages.block import Block
from lightning_compress.stages.branch_hooks import gated, in_backward
from lightning_compress.stages.split import running

GATES = "skip_gates"  # the name of a network's child that holds its gates
GateKind = Literal["per_block", "recurrent", "policy"]
_EDGE = 1e-6  # of uniform numbers, whose logit is finite


class Instead(Protocol):
    """Decides in the place of gates: returns the factors (N,) of block k, given what it reads."""

    def __call__(self, k: int, x: Tensor) -> Tensor: ...


class SkipGates(nn.Module):
    """The gates of a network, as its child `skip_gates`. Hooks on the network call `decide` whenever it runs.

    It returns what it is called with, so that a network that runs its children one after another stays as it was.

    Args:
        blocks: In the order in which they run.
        features: What the gate of each block reads.
        macs: Of the network with all blocks, for one sample.
        kind: "per_block": a gate of its own before each block; "recurrent": one for all, with a memory; "policy": one
            that reads what the first block reads, and decides for all blocks.

    Attributes:
        rates: Share of the samples that run each block, (K,) on the CPU, as last measured; NaN before that.
        draws: Whether decisions are drawn in training.
        straight_through: Whether decisions get the gradient of their probabilities.
        temperature: T.
        explores: The share e of exploration: a gate opens with the probability (1 - e) p + e (1 - p).
        first: The first block whose gate decides; the blocks before it always run.
        instead: Decides in the gates' place, if it is set.
        fixed: The blocks, by number, that run for all samples, or for nobody, whatever is decided.
    """

    def __init__(
        self, blocks: Sequence[Block], features: Sequence[Features], *, macs: int, kind: GateKind = "per_block"
    ) -> None:
        super().__init__()
        if kind not in get_args(GateKind):
            raise ValueError(f"gate is one of {', '.join(get_args(GateKind))}; got {kind!r}.")
        self.blocks = tuple(blocks)
        self.features = tuple(features)
        self.macs = macs
        self.kind: GateKind = kind
        self.rates = torch.full((len(blocks),), float("nan"), dtype=torch.float64)
        self.draws = False
        self.straight_through = True
        self.temperature = 1.0
        self.explores = 0.0
        self.first = 0
        self.instead: Instead | None = None
        self.fixed: dict[int, bool] = {}
        self._pass = _Pass()
        if kind == "per_block":
            for number, one in enumerate(features, start=1):
                self.add_module(str(number), BlockGate(one))
        elif kind == "recurrent":
            self.recurrent = RecurrentGate(features)
        else:
            self.policy = PolicyGate(features[0], len(blocks))

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, unchanged: Tensor) -> Tensor:
        return unchanged

    @property
    def shares(self) -> Tensor:
        """The share of the network's MACs that each block has, (K,)."""
        return torch.tensor([block.macs / self.macs for block in self.blocks], dtype=torch.float64)

    @property
    def least(self) -> float:
        """The share of the network's MACs that remains without any block."""
        return 1.0 - float(self.shares.sum())

    def used(self, rates: Tensor) -> Tensor:
        """Return the mean share of the MACs that samples use, where they run blocks at these rates, (..., K)."""
        return self.least + (rates * self.shares.to(rates.device, rates.dtype)).sum(-1)

    def logit(self, k: int, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the logit of block k for each sample, (N,), and the state for the next block.

        Args:
            k: The block.
            x: What it reads, for all samples.
            state: What the call for the block before has returned; None for the first one.
        """
        if self.kind == "per_block":
            return self.get_submodule(str(k + 1))(x), None
        if self.kind == "recurrent":
            logit, state = self.recurrent(k, x, state)
            return logit, state
        logits = self.policy(x) if state is None else state
        return logits[:, k], logits

    def begin_pass(self) -> None:
        """Forget what the network has read, because it is called again."""
        self._pass.begin()

    def decide(self, k: int, x: Tensor) -> Tensor | None:
        """Return the factors (N,) of block k, given what it reads; None: it runs for all samples."""
        if self.instead is not None and k not in self.fixed:
            return self.instead(k, x)
        logit, state = self.logit(k, x, self._pass.state_before(k))
        self._pass.after(k, state)
        if k in self.fixed:
            return torch.full_like(logit, float(self.fixed[k]))
        if k < self.first:
            return None
        if self.training and self.draws:
            drawn = self._drawn(logit)
        else:
            sign = _hard((logit / self.temperature).sigmoid()) if self.training else (logit > 0).to(logit.dtype)
            drawn = Decision(logit, sign)
        self._pass.decided(k, drawn)
        return drawn.runs if self.straight_through else drawn.runs.detach()

    def _drawn(self, logit: Tensor) -> Decision:
        uniform = torch.rand_like(logit).clamp(_EDGE, 1.0 - _EDGE)
        if self.straight_through:
            return Decision(logit, _hard(((logit + uniform.logit()) / self.temperature).sigmoid()))
        chance = logit.detach().sigmoid()
        chance = (1.0 - self.explores) * chance + self.explores * (1.0 - chance)
        return Decision(logit, (uniform < chance).to(logit.dtype))

    @contextmanager
    def apart(self, instead: Instead | None = None) -> Iterator[None]:
        """Let the block run the network for a purpose of its own, between a forward pass and its gradients.

        Args:
            instead: Decides in the gates' place.
        """
        was, self._pass = (self._pass, self.instead), _Pass()
        self.instead = instead
        try:
            yield
        finally:
            self._pass, self.instead = was

    @contextmanager
    def collecting(self) -> Iterator[Decisions]:
        """Yield what the gates decide while the block runs the network."""
        found = Decisions(len(self))
        was = self._pass.begin_collecting(found)
        try:
            yield found
        finally:
            self._pass.found = was


class Decision:
    """What a gate has decided for the samples of a batch.

    Args:
        logit: Of each sample, (N,).
        runs: 1 where it runs the block, 0 where not; with the gradient, if there is one.
    """

    __slots__ = ("logit", "runs")

    def __init__(self, logit: Tensor, runs: Tensor) -> None:
        self.logit, self.runs = logit, runs


class Decisions:
    """The decisions of one or more forward passes.

    Args:
        blocks: How many blocks there are.

    Attributes:
        passes: For each pass, the decisions by the number of the block.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.passes: list[dict[int, Decision]] = []

    def runs(self) -> Tensor | None:
        """Return who ran which block, (N, K) with gradients; None if the network did not run."""
        return self._stacked(lambda one: one.runs, 1.0)

    def logits(self) -> Tensor | None:
        """Return the logits, (N, K)."""
        return self._stacked(lambda one: one.logit, float("inf"))

    def _stacked(self, pick: Any, otherwise: float) -> Tensor | None:
        rows = []
        for one in filter(None, self.passes):
            like = pick(next(iter(one.values())))
            columns = [pick(one[k]) if k in one else torch.full_like(like, otherwise) for k in range(self.blocks)]
            rows.append(torch.stack(columns, dim=1))
        return torch.cat(rows) if rows else None


class _Pass:
    """The forward pass that runs: the state before each block, and where decisions are collected.

    A checkpoint of activations runs blocks again in the backward pass, each with the state that it had. A copy of the
    gates begins without one.
    """

    def __init__(self) -> None:
        self.found: Decisions | None = None
        self._states: dict[int, Any] = {}  # before each block
        self._state: Any = None  # after the last
        self._last = 0  # the block that was read last
        self._fresh = False  # whether the network was called since
        self._passes = 0  # since the block of `collecting` began

    def __reduce__(self) -> tuple[Any, ...]:
        return _Pass, ()

    def __deepcopy__(self, memo: Any) -> _Pass:
        return _Pass()

    def begin_collecting(self, found: Decisions | None) -> Decisions | None:
        was, self.found = self.found, found
        self._passes = 0
        return was

    def begin(self) -> None:
        self._fresh = True

    def state_before(self, k: int) -> Any:
        if not in_backward():
            # Code may drop any blocks in training, and call modules inside the network without calling it.
            if self._fresh or k <= self._last or self._passes == 0:
                self._fresh = False
                self._states.clear()
                self._state = None
                self._passes = 1 if self.found is None else self._passes + 1
                if self.found is not None:
                    self.found.passes.append({})
            self._last = k
            self._states[k] = self._state
        return self._states.get(k)

    def after(self, k: int, state: Any) -> None:
        if not in_backward():
            self._state = state
        elif state is not None and self._passes > 1:
            raise ValueError(
                "A network with gates ran twice in one step under activation checkpointing, and its gates do not know "
                "which of the two the backward pass runs again: take gate='per_block', or call the network once."
            )

    def decided(self, k: int, decision: Decision) -> None:
        if self.found is not None and not in_backward():
            self.found.passes[-1][k] = decision


def _hard(probability: Tensor) -> Tensor:
    """Return 1 where a probability is above 1/2, else 0, with the gradient of the probability."""
    return probability + ((probability > 0.5).to(probability.dtype) - probability).detach()  # exact, by Sterbenz


def new_gates(
    network: nn.Module, inputs: ExampleInputs, blocks: Sequence[Block], *, macs: int, kind: GateKind
) -> SkipGates:
    """Return gates for the blocks of a network, which does not have them yet; all are open.

    Args:
        network: The network.
        inputs: What it is called with.
        blocks: In the order in which they run.
        macs: Of the network with all blocks, for one sample.
        kind: As for `SkipGates`.
    """
    features: dict[int, Features] = {}
    likes: dict[int, Tensor] = {}

    def look(k: int, x: Tensor) -> None:
        inside = [one for name in blocks[k].modules for one in network.get_submodule(name).modules()]
        maps = any(isinstance(one, _ConvNd) for one in inside)
        axis = 1 if maps or x.dim() == 2 else x.dim() - 1
        features[k], likes[k] = Features(x.dim(), axis, x.shape[axis]), x

    with running(network), hooked(*gated(network, blocks, look)):
        call(network, inputs)
    with torch.random.fork_rng([]):  # the random draws of the fit stay what they are without gates
        made = SkipGates(blocks, [features[k] for k in range(len(blocks))], macs=macs, kind=kind)
    return made.to(likes[0].device, likes[0].dtype)


def gates_of(network: nn.Module) -> SkipGates | None:
    """Return the gates of a network; None if it has none."""
    found = network._modules.get(GATES)
    return found if isinstance(found, SkipGates) else None
