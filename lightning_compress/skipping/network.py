"""A network in which each sample runs the residual blocks that its gates choose, and no others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from lightning_compress.core.axes import BATCH, Axes, arguments
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.given import real_number
from lightning_compress.core.hooks import hooked
from lightning_compress.core.outputs import select_output
from lightning_compress.skipping.budget import MOSTLY, SELDOM
from lightning_compress.skipping.gains import gains
from lightning_compress.skipping.gates import SkipGates
from lightning_compress.skipping.program import Program, program_of
from lightning_compress.skipping.run import Run
from lightning_compress.stages.block import Block
from lightning_compress.stages.blocks import Found, found_in
from lightning_compress.stages.branch_hooks import gated
from lightning_compress.stages.inputs import Inputs
from lightning_compress.stages.live import Live, StaleError
from lightning_compress.stages.split import Examples, axes_of, differ, different, running
from lightning_compress.stages.trace import SplitError

log = logging.getLogger(__name__)

_KEPT = 4  # of the example's samples
_TIMED = 32  # samples in a batch that is timed


class SkippingNetwork(nn.Module):
    """A network that runs each of its residual blocks for the samples whose gates choose it; for evaluation.

    Samples that need a block are gathered, the block runs for them, and its results are added to theirs. A block that
    no sample needs does not run. With a policy, which decides for all blocks at once, the device is waited for once,
    and the batch is sorted so that samples that need a block are neighbours where that saves gathering.

    Args:
        network: Without hooks of gates. Its weights are used as they are at each call.
        gates: Have the blocks, a logit for each of them, and the rates at which they ran, NaN if that is not known. A
            block whose rate is below 0.05 runs for nobody, above 0.95 for all, and its gate is not computed.
        example_inputs: Some samples. Later inputs must have their shapes and types, but for the number of samples.
        output: Which tensor of the network's output is the answer: key, position or attribute.
        min_gain: The share of the network's time that a block must save to be skipped, measured here where rates are
            known: its own time for those who skip it, less its gate and the gathering. One that saves less runs for
            all, which is logged, and which changes the answers for the samples that would have skipped it. None: the
            gates decide, as in validation.
        always: Names of blocks that run for all samples.
        never: Names of blocks that run for nobody.

    Raises:
        ValueError: A block is not in the network, or none is left to be skipped.
        MixedSamplesError: A sample's output depends on the other samples.
        SplitError: torch.export cannot trace the network, or it computes something else with fewer samples.
    """

    def __init__(
        self,
        network: nn.Module,
        gates: SkipGates,
        example_inputs: ExampleInputs,
        *,
        output: str | int | None = None,
        min_gain: float | None = None,
        always: Sequence[str] = (),
        never: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if min_gain is not None:
            min_gain = real_number(
                min_gain, "min_gain is the share of the time that a block must save, or None", infinite=True
            )
        self.network, self.gates, self.output, self.min_gain = network, gates, output, min_gain
        self.blocks: tuple[Block, ...] = gates.blocks
        plain = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
        with running(network):
            axes = axes_of(network, plain, output)
        self._kept = min(axes.sizes[BATCH], _KEPT)
        args, kwargs = arguments(axes.resized({BATCH: self._kept}))
        self._inputs = Inputs(args, kwargs, [BATCH in named.values() for named in axes.named])
        for i, one in enumerate(self._inputs.leaves):
            if isinstance(one, Tensor):
                self.register_buffer(f"_example_{i}", one.detach().clone(), persistent=False)
        self._inputs.forget_tensors()
        self._fixed = self._static(always, never)
        self._program: Program | None = None
        self._live: Live | None = None
        found = self._prepare()
        if found is not None:
            self._leave_out(found)

    @property
    def always(self) -> tuple[str, ...]:
        """The names of the blocks that run for all samples."""
        return tuple(block.name for k, block in enumerate(self.blocks) if self._fixed.get(k) is True)

    @property
    def never(self) -> tuple[str, ...]:
        """The names of the blocks that run for nobody."""
        return tuple(block.name for k, block in enumerate(self.blocks) if self._fixed.get(k) is False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of every sample, in the order of the input."""
        return self._answer(args, kwargs)[0]

    def decisions(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the output of every sample, and who ran which block, (N, K)."""
        answer, run = self._answer(args, kwargs, record=True)
        if run is None:
            return answer, torch.empty(0, len(self.blocks), dtype=torch.bool, device=answer.device)
        always = [k for k, runs in self._fixed.items() if runs]
        return answer, run.decisions(answer.shape[0], len(self.blocks), answer.device, always)

    def example_inputs(self) -> Any:
        """Return some samples as positional and keyword arguments."""
        return self._inputs.arguments(self._example_leaves())

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has, which looks at its network anew: it may be of another type or place by then."""
        return self.__dict__ | {"_live": None, "_program": None}

    def _answer(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, record: bool = False
    ) -> tuple[Tensor, Run | None]:
        self._refuse_training()
        inputs, samples = self._inputs.checked(args, kwargs, self._example_leaves())
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        if samples == 0:
            none = torch.empty(0, *self._answer_shape, dtype=self._answer_type, device=tensors[0].device)
            return none, None
        if self._program is None:
            self._prepare()
        try:
            return self._run(tensors, record=record)
        except StaleError:
            log.info("%s has changed since its blocks were found, and is looked at anew.", type(self.network).__name__)
            self._prepare()
            return self._run(tensors, record=record)

    def _run(
        self, tensors: Sequence[Tensor], *, record: bool = False, forced: Tensor | None = None
    ) -> tuple[Tensor, Run]:
        assert self._program is not None
        assert self._live is not None
        gates = self.gates
        run = Run(self._program.blocks, self._live.tensors, gates, fixed=self._fixed, forced=forced, record=record)
        trunk = self._program.trunk
        answer = trunk.module.forward(run, *tensors, *self._live.tensors(trunk))
        if run.order is not None:
            rows = self._program.answer
            answer = run.unsorted(answer, rows.dim) if rows.each == 1 else rows.take(answer, run.order.argsort())
        return answer, run

    def _example_leaves(self) -> list[Any]:
        buffers = self._buffers
        return [buffers.get(f"_example_{i}", one) for i, one in enumerate(self._inputs.leaves)]

    def _static(self, always: Sequence[str], never: Sequence[str]) -> dict[int, bool]:
        """Return the blocks that run for all, or for nobody, because that was asked for or measured."""
        names = [block.name for block in self.blocks]
        for name in (*always, *never):
            if name not in names:
                raise ValueError(f"There is no block {name!r} with a gate: pass names of {', '.join(names)}.")
        if both := set(always) & set(never):
            raise ValueError(f"The block {min(both)!r} stands in always= and in never=: pass it in one.")
        fixed: dict[int, bool] = {}
        for k, (name, rate) in enumerate(zip(names, self.gates.rates.tolist(), strict=True)):
            if name in always or name in never:
                fixed[k] = name in always
            elif rate < SELDOM or rate > MOSTLY:
                fixed[k] = rate > MOSTLY
        return fixed

    def _refuse_training(self) -> None:
        modules = list(self.network.modules()) if self._live is None else self._live.modules
        if self.training or True in [module.training for module in modules]:
            raise ValueError("A network that skips blocks runs in evaluation mode only: call .eval() first.")

    @torch.inference_mode(False)  # torch.export needs tensors of every mode
    def _prepare(self) -> Found | None:
        """Find the blocks, build the program, and prove it. Return the blocks if some may be skipped."""
        args, kwargs = self.example_inputs()
        inputs: ExampleInputs = kwargs or args
        with evaluating(self):
            found = found_in(self.network, inputs, self.output)
            for block in self.blocks:
                if block.name not in found.of:
                    reason = found.blocks.refused.get(block.name, "there is no such sum")
                    raise ValueError(f"The network has no block {block.name!r} any more: {reason}.")
            axes = axes_of(self.network, inputs, self.output)
            Examples(self.network, [], axes, self.output)
            self._constants = found.branches.graph.constants
            self._build(found)
            self._prove(axes)
        return found if len(self._fixed) < len(self.blocks) else None

    def _build(self, found: Found) -> None:
        names = [block.name for block in self.blocks]
        free = [k for k in range(len(names)) if k not in self._fixed]
        # a recurrent gate must see all blocks up to the last that it decides for
        kept = set(range(max(free, default=-1))) if self.gates.kind == "recurrent" else set()
        always = [k for k, runs in self._fixed.items() if runs and k not in kept]
        never = [k for k, runs in self._fixed.items() if not runs and k not in kept]
        self._program = program_of(found, names, always, never, policy=self.gates.kind == "policy")
        self._live = Live(self.network, self._constants)
        for stage in (self._program.trunk, *(part.stage for part in self._program.blocks.values())):
            self._live.tensors(stage)  # of the types and places for which the graph was made

    def _prove(self, axes: Axes) -> None:
        """Compare the network in which random samples skip blocks with one whose hooks multiply them by 0 or 1."""
        leaves = different(axes)
        tensors = [one for one in leaves if isinstance(one, Tensor)]
        samples, device = next((len(one), one.device) for one, d in zip(leaves, axes.named, strict=True) if d)
        generator = torch.Generator().manual_seed(0)
        runs = torch.rand(samples, len(self.blocks), generator=generator) < 0.5
        for k, fixed in self._fixed.items():
            runs[:, k] = fixed
        runs = runs.to(device)
        with hooked(*gated(self.network, self.blocks, lambda k, x: runs[:, k].float())):
            found = call(self.network, tree_unflatten(list(leaves), axes.spec))
        expected = select_output(found, self.output, type(self.network).__name__)
        self._answer_shape, self._answer_type = tuple(expected.shape[1:]), expected.dtype
        got, _ = self._run(tensors, forced=runs)
        assert self._program is not None
        if (difference := differ([got], [expected])) and self._program.turn():
            got, _ = self._run(tensors, forced=runs)
            difference = differ([got], [expected])
        if difference:
            raise SplitError(f"{type(self.network).__name__} was tried with blocks for some samples: {difference}.")

    def _leave_out(self, found: Found) -> None:
        """Have blocks run for all samples that would not save their gate and gathering."""
        rates = self.gates.rates
        if self.min_gain is None or bool(rates.isnan().any()):
            return
        assert self._program is not None
        assert self._live is not None
        leaves = self._example_leaves()
        index = torch.arange(_TIMED, device=next(one.device for one in leaves if isinstance(one, Tensor))) % self._kept
        many = [
            one.index_select(0, index) if has_samples else one
            for one, has_samples in zip(leaves, self._inputs.has_samples, strict=True)
            if isinstance(one, Tensor)
        ]
        with evaluating(self):
            saved = gains(self._program, self._live, self.gates, many, rates.tolist(), self._fixed)
        out = {k: gain for k, gain in saved.items() if gain < self.min_gain}
        for k, gain in out.items():
            log.info(
                "The block %r runs for all samples: skipping it at its rate of %.2f would save %.1f %% of the time.",
                *(self.blocks[k].name, float(rates[k]), 100 * gain),
            )
        if out:
            self._fixed |= dict.fromkeys(out, True)
            self._build(found)
