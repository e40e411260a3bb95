"""A network whose easy samples leave early, and which computes no more of the rest than the others need."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.axes import BATCH, arguments
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.given import flag, real_number
from lightning_compress.core.outputs import select_output
from lightning_compress.early_exit.answers import Answers, WholeBatchAnswers
from lightning_compress.early_exit.gains import Times, left_out, measured
from lightning_compress.early_exit.rules import Confidence, ExitRule
from lightning_compress.early_exit.static import Served, Static
from lightning_compress.early_exit.whole_batch import run_whole
from lightning_compress.stages.extract import Stage
from lightning_compress.stages.inputs import Inputs
from lightning_compress.stages.live import Live, StaleError
from lightning_compress.stages.split import Examples, MixedSamplesError, SplitError, axes_of, running, split
from lightning_compress.stages.stages import Stages

log = logging.getLogger(__name__)

_KEPT = 4  # of the example's samples
_TIMED = 32  # samples in a batch that is timed


class EarlyExitNetwork(nn.Module):
    """A network with exits, at which samples leave a batch one by one; for evaluation.

    Calling it returns the output of every sample, in the order of the input, and the number of the exit where it left,
    counted from 0: with K exits, K is the full network. Samples that stay are gathered at each exit, and the next stage
    of the network computes only them. A network that cannot be cut (the reason is logged once) runs whole batches: the
    answers are the same, but the rest is skipped only when every sample has left.

    Args:
        network: Its weights are used as they are at each call.
        heads: By exits, which are qualified names of layers that run exactly once and return one tensor with the batch
            first, in the order in which they return. A head makes of that tensor what the network returns.
        rule: When a sample leaves; None: only `exit=` says.
        example_inputs: Some samples. Later inputs must have their shapes and types, but for the number of samples.
        output: Which tensor of the network's output is the answer: key, position or attribute.
        confidence: The callable of the rule "custom".
        min_gain: The share of the full network's time that an exit must save to be used, measured here if the rule has
            the shares of samples that leave at each exit: the rest of the network for those that leave, less the head
            and the gathering for those that come there. An exit that saves less is left out, which is logged,
            unless it is more often right there than the full network. This is so for the thresholds of each `budget`.
        compile: Compile every stage with torch.compile.
        whole_batch: Run whole batches, and cut nothing.

    Raises:
        ValueError: A layer is none that an exit can follow, a head does not fit its layer, the rule has another number
            of exits, or the network mixes the samples of a batch.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> rule = ExitRule(rule="margin", thresholds=(0.2,), temperatures=(1.0, 1.0))
        >>> early = EarlyExitNetwork(network, {"1": nn.Linear(8, 2)}, rule, torch.randn(3, 4)).eval()
        >>> output, exit_index = early(torch.randn(5, 4))
        >>> output.shape, exit_index.shape
        (torch.Size([5, 2]), torch.Size([5]))
        >>> early(torch.randn(5, 4), exit=1)[1]
        tensor([0, 0, 0, 0, 0])
    """

    def __init__(
        self,
        network: nn.Module,
        heads: Mapping[str, nn.Module],
        rule: ExitRule | None,
        example_inputs: ExampleInputs,
        *,
        output: str | int | None = None,
        confidence: Confidence | None = None,
        min_gain: float = 0.0,
        compile: bool = False,
        whole_batch: bool = False,
    ) -> None:
        super().__init__()
        flag(compile, "compile")
        flag(whole_batch, "whole_batch")
        self.exits = tuple(heads)
        if not self.exits:
            raise ValueError("heads is empty: pass at least one layer's name with its head.")
        if rule is not None and len(rule.thresholds) != len(self.exits):
            raise ValueError(f"The rule has {len(rule.thresholds)} thresholds, and there are {len(self.exits)} exits.")
        self.network = network
        self.heads = nn.ModuleList(heads.values())
        self.rule, self.output, self.confidence = rule, output, confidence
        self.compile_stages, self.whole_batch, self.reason = compile, whole_batch, ""
        plain = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
        with running(network):
            axes = axes_of(network, plain, output)
        self._kept = min(axes.sizes[BATCH], _KEPT)
        few = axes.resized({BATCH: self._kept})
        args, kwargs = arguments(few)
        self._inputs = Inputs(args, kwargs, [BATCH in named.values() for named in axes.named])
        for i, one in enumerate(self._inputs.leaves):
            if isinstance(one, Tensor):
                self.register_buffer(f"_example_{i}", one.detach().clone(), persistent=False)
        self._inputs.forget_tensors()
        self._stages: Stages | None = None
        self._live: Live | None = None
        self._compiled: dict[Stage, Any] = {}
        self._answer_shape: tuple[int, ...] = ()
        self._prepare()
        self.min_gain = real_number(min_gain, "min_gain is the share of the time that an exit must save", infinite=True)
        self.left_out: tuple[int, ...] = ()  # by the rule's own thresholds, counted from 0
        self._left_out: dict[tuple[float, ...], tuple[int, ...]] = {}  # by the thresholds of budgets
        self._times: Times | None = None
        if rule is not None and (rule.shares or rule.frontier_shares):
            self._times = self._measured(rule)
            self.left_out = self._not_worth_it(rule)

    def forward(
        self, *args: Any, exit: int | None = None, budget: float | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the output for every sample, and at which exit it left, counted from 0.

        Args:
            *args: Of the network.
            exit: All samples leave there, counted from 1; one more than there are exits: the full network.
            budget: The mean cost per sample, in the rule's unit, for which thresholds are taken from its frontier.
            **kwargs: Of the network.
        """
        self._refuse_training()
        inputs, samples = self._inputs.checked(args, kwargs, self._example_leaves())
        if samples == 0:
            device = next(one.device for one in inputs if isinstance(one, Tensor))
            none = torch.empty(0, *self._answer_shape, dtype=self._answer_type, device=device)
            return none, torch.empty(0, dtype=torch.long, device=device)
        if exit is not None:
            if budget is not None:
                raise ValueError(f"exit={exit} and budget={budget}: pass one of them.")
            answer = self.at_exit(inputs, exit)
            return answer, torch.full((samples,), exit - 1, dtype=torch.long, device=answer.device)
        rule, exits = self._rule(budget)
        batch = (WholeBatchAnswers if self.whole_batch else Answers)(rule, self.heads, self.confidence)
        rest = self._run(inputs, exits, batch)
        if rest is not None:
            batch.put(rest, len(self.exits))
        assert batch.output is not None
        assert batch.index is not None
        return batch.output, batch.index

    def at_exit(self, inputs: Sequence[Any], exit: int) -> Tensor:
        """Return what an exit answers, counted from 1, without running what comes after it."""
        last = len(self.exits) + 1
        if not 1 <= exit <= last:
            raise ValueError(f"exit={exit}: pass a number from 1 to {last}, which is the full network.")
        found = self._run(inputs, (), None, None if exit == last else exit)
        assert found is not None
        answer: Tensor = found if exit == last else self.heads[exit - 1](found)
        return answer

    def static(self, exit: int) -> nn.Module:
        """Return the network up to an exit, counted from 1, and its head, as a module that returns the output alone.

        It shares the weights that it needs, and has no others; torch.export and ONNX take it, unless the network could
        not be cut.
        """
        last = len(self.exits) + 1
        if not 1 <= exit <= last:
            raise ValueError(f"exit={exit}: pass a number from 1 to {last}, which is the full network.")
        if self._stages is None:
            self._prepare()
        if self._stages is None:
            return Served(self, exit=exit)
        stage = self._stages.between(0, exit, leave=True)
        tensors = dict(zip(stage.names, Live(self.network, self._stages.graph.constants).tensors(stage), strict=True))
        head = None if exit == last else self.heads[exit - 1]
        return Static(self._stages.alone(exit, tensors), head).train(self.training)

    def example_inputs(self) -> Any:
        """Return some samples as positional and keyword arguments."""
        return self._inputs.arguments(self._example_leaves())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_live": None, "_compiled": {}}

    def _example_leaves(self) -> list[Any]:
        buffers = self._buffers
        return [buffers.get(f"_example_{i}", one) for i, one in enumerate(self._inputs.leaves)]

    def _rule(self, budget: float | None) -> tuple[ExitRule, list[int]]:
        if self.rule is None:
            raise ValueError("There are no thresholds yet: calibrate the exits, or pass exit= with the number of one.")
        rule, left_out = self.rule, self.left_out
        if budget is not None:
            rule = self.rule.within(budget)
            if rule.thresholds not in self._left_out:
                self._left_out[rule.thresholds] = self._not_worth_it(rule)
            left_out = self._left_out[rule.thresholds]
        return rule, [k + 1 for k in rule.open if k not in left_out]

    def _refuse_training(self) -> None:
        modules = list(self.network.modules()) if self._live is None else self._live.modules
        if not self.training and True not in [module.training for module in modules]:
            return
        for name, module in self.network.named_modules():
            if module.training and isinstance(module, nn.modules.batchnorm._NormBase):
                raise ValueError(
                    f"{name} ({type(module).__name__}) is in training mode, in which it mixes the samples of a batch, "
                    f"so that none can leave before the others: call .eval() first."
                )
        raise ValueError("A network with exits runs in evaluation mode only: call .eval() first.")

    @torch.inference_mode(False)  # torch.export needs tensors of every mode
    def _prepare(self) -> None:
        """Cut the network, or find that it runs whole batches, and see that the heads fit."""
        args, kwargs = self.example_inputs()
        inputs: ExampleInputs = kwargs or args
        self._live, self._compiled = None, {}
        if not self.whole_batch:
            try:
                self._stages = split(self.network, self.exits, inputs, output=self.output)
                self._live = Live(self.network, self._stages.graph.constants)
            except MixedSamplesError:
                raise
            except SplitError as error:
                self._stages, self.whole_batch, self.reason = None, True, str(error)
                log.warning(
                    "%s runs whole batches: a batch leaves when each of its samples may. %s",
                    *(type(self.network).__name__, error),
                )
        elif not self.reason:
            self.reason = "whole_batch=True"
            Examples(self.network, self.exits, axes_of(self.network, inputs, self.output), self.output)
        with evaluating(self):
            leaves = self._example_leaves()
            answer = self.at_exit(leaves, len(self.exits) + 1)
            self._answer_shape, self._answer_type = tuple(answer.shape[1:]), answer.dtype
            for k, layer in enumerate(self.exits, 1):
                try:
                    found = self.at_exit(leaves, k)
                except RuntimeError as error:
                    raise ValueError(f"The head of exit {layer!r} does not take what it returns: {error}") from error
                if found.shape != answer.shape:
                    raise ValueError(
                        f"The head of exit {layer!r} returns shape {tuple(found.shape)}, and the network "
                        f"{tuple(answer.shape)}."
                    )

    def _measured(self, rule: ExitRule) -> Times | None:
        """Return how long stages and exits take here; None for a network that is not cut."""
        if self._stages is None:
            return None
        inputs = [one for one in self._example_leaves() if isinstance(one, Tensor)]
        many = self._stages.gather(0, inputs, torch.arange(_TIMED, device=inputs[0].device) % self._kept)
        with evaluating(self):
            return measured(self._stages, self._execute, Answers(rule, self.heads, self.confidence), many)

    def _not_worth_it(self, rule: ExitRule) -> tuple[int, ...]:
        """Find the open exits that would save less than `min_gain` of the full network's time."""
        if self._times is None or not rule.shares:
            return ()
        found = left_out(rule, self._times, self.min_gain)
        for k, gain in found.items():
            log.info(
                "The exit %r is left out: %.1f %% of the samples left there, and it would save %.1f %% of the time.",
                *(self.exits[k], 100 * rule.shares[k], 100 * gain),
            )
        return tuple(found)

    def _run(
        self, inputs: Sequence[Any], exits: Sequence[int], batch: Answers | None, last: int | None = None
    ) -> Tensor | None:
        if self._stages is None and not self.whole_batch:
            self._prepare()
        visit = _never if batch is None else batch.visit
        if self.whole_batch:
            args, kwargs = self._inputs.arguments(inputs)

            def forward() -> Tensor:
                return select_output(self.network(*args, **kwargs), self.output, type(self.network).__name__)

            layers = {cut: self.network.get_submodule(name) for cut, name in enumerate(self.exits, 1)}
            return run_whole(forward, layers, exits, visit, last)
        assert self._stages is not None
        if self._live is None:
            self._live = Live(self.network, self._stages.graph.constants)
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        try:
            return self._stages.run(self._execute, tensors, exits, visit, last)
        except StaleError:
            log.info("%s has changed since it was cut into stages, and is cut anew.", type(self.network).__name__)
            self._prepare()
            if batch is not None:
                batch.reset()
            return self._run(inputs, exits, batch, last)

    def _execute(self, stage: Stage, carried: Sequence[Tensor]) -> Any:
        assert self._live is not None
        module: Any = stage.module
        if self.compile_stages:
            if stage not in self._compiled:
                self._compiled[stage] = torch.compile(module)
            module = self._compiled[stage]
        return module(*carried, *self._live.tensors(stage))


def _never(cut: int, feature: Tensor) -> Tensor | None:
    return None
