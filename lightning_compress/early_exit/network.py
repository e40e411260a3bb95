"""A network whose easy samples leave early, and which computes no more of the rest than the others need."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_compress.core.axes import BATCH, arguments
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.outputs import select_output
from lightning_compress.early_exit.answers import Answers, WholeBatchAnswers
from lightning_compress.early_exit.gains import left_out, measured
from lightning_compress.early_exit.live import Live, StaleError
from lightning_compress.early_exit.rules import Confidence, ExitRule
from lightning_compress.early_exit.split import Examples, MixedSamplesError, SplitError, axes_of, running, split
from lightning_compress.early_exit.stages import Stage, Stages

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
            and the gathering for those that come there. An exit that saves less is left out, which is logged.
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
        examples, self._spec = tree_flatten(arguments(few))
        self._keywords = tuple(plain) if isinstance(plain, dict) else ()
        self._examples: list[Any] = [None if isinstance(one, Tensor) else one for one in examples]
        self._has_samples = [BATCH in named.values() for named in axes.named]
        for i, one in enumerate(examples):
            if isinstance(one, Tensor):
                self.register_buffer(f"_example_{i}", one.detach().clone(), persistent=False)
        self._stages: Stages | None = None
        self._live: Live | None = None
        self._compiled: dict[Stage, Any] = {}
        self._answer_shape: tuple[int, ...] = ()
        self._prepare()
        self.left_out: tuple[int, ...] = ()  # counted from 0
        if rule is not None and rule.shares and rule.open:
            self.left_out = self._not_worth_it(rule, min_gain)

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
        inputs = self._checked(args, kwargs)
        samples = next(one.shape[0] for one, has in zip(inputs, self._has_samples, strict=True) if has)
        reference = next(one for one in inputs if isinstance(one, Tensor))
        if samples == 0:
            shape, dtype = self._answer_shape, self._answer_type
            none = torch.empty(0, *shape, dtype=dtype, device=reference.device)
            return none, torch.empty(0, dtype=torch.long, device=reference.device)
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
            return _WholeStatic(self, exit)
        stage = self._stages.between(0, exit, leave=True)
        tensors = dict(zip(stage.names, Live(self.network, self._stages).tensors(stage), strict=True))
        head = None if exit == last else self.heads[exit - 1]
        return _Static(self._stages.alone(exit, tensors), head).train(self.training)

    def example_inputs(self) -> Any:
        """Return some samples as positional and keyword arguments."""
        return tree_unflatten(self._example_leaves(), self._spec)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_live": None, "_compiled": {}}

    def _example_leaves(self) -> list[Any]:
        found = enumerate(self._examples)
        return [getattr(self, f"_example_{i}", one) if one is None else one for i, one in found]

    def _rule(self, budget: float | None) -> tuple[ExitRule, list[int]]:
        if self.rule is None:
            raise ValueError("There are no thresholds yet: calibrate the exits, or pass exit= with the number of one.")
        rule = self.rule if budget is None else self.rule.within(budget)
        return rule, [k + 1 for k in rule.open if k not in self.left_out]

    def _refuse_training(self) -> None:
        modules = self.network.modules() if self._live is None else self._live.modules
        if not self.training and not any(module.training for module in modules):
            return
        for name, module in self.network.named_modules():
            if module.training and isinstance(module, nn.modules.batchnorm._NormBase):
                raise ValueError(
                    f"{name} ({type(module).__name__}) is in training mode, in which it mixes the samples of a batch, "
                    f"so that none can leave before the others: call .eval() first."
                )
        raise ValueError("A network with exits runs in evaluation mode only: call .eval() first.")

    def _checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the leaves of the inputs, which must be like those of the example."""
        kwargs = {name: kwargs[name] for name in self._keywords if name in kwargs} | kwargs  # in the example's order
        leaves, spec = tree_flatten((args, kwargs))
        if spec != self._spec:
            raise ValueError(
                f"The inputs are {_structure(args, kwargs)}, and those of the example were "
                f"{_structure(*self.example_inputs())}: pass the same arguments."
            )
        number: int | None = None
        for i, (leaf, has_samples) in enumerate(zip(leaves, self._has_samples, strict=True)):
            example = self._examples[i]
            if example is None and (example := getattr(self, f"_example_{i}", None)) is None:
                continue
            if not isinstance(example, Tensor):
                if leaf != example:
                    raise ValueError(f"An input is {leaf!r}, and was {example!r} in the example.")
                continue
            alike = leaf.shape[1:] == example.shape[1:] if has_samples and leaf.dim() else leaf.shape == example.shape
            if not alike or leaf.dtype != example.dtype:
                raise ValueError(
                    f"An input has shape {tuple(leaf.shape)} and type {leaf.dtype}, and in the example it had "
                    f"{tuple(example.shape)} and {example.dtype}: only the number of samples may differ."
                )
            if has_samples:
                if number is not None and leaf.shape[0] != number:
                    raise ValueError(f"One input has {number} samples, and another one {leaf.shape[0]}.")
                number = leaf.shape[0]
        return leaves

    def _prepare(self) -> None:
        """Cut the network, or find that it runs whole batches, and see that the heads fit."""
        args, kwargs = self.example_inputs()
        inputs: ExampleInputs = kwargs or args
        self._live, self._compiled = None, {}
        if not self.whole_batch:
            try:
                self._stages = split(self.network, self.exits, inputs, output=self.output)
                self._live = Live(self.network, self._stages)
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

    def _not_worth_it(self, rule: ExitRule, min_gain: float) -> tuple[int, ...]:
        """Find the open exits that would save less than `min_gain` of the full network's time."""
        if self._stages is None:
            return ()
        inputs = [one for one in self._example_leaves() if isinstance(one, Tensor)]
        many = self._stages.gather(0, inputs, torch.arange(_TIMED, device=inputs[0].device) % self._kept)
        with evaluating(self):
            times = measured(self._stages, self._execute, Answers(rule, self.heads, self.confidence), many, rule.open)
        found = left_out(rule, times, min_gain)
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
        if self.whole_batch:
            return self._run_whole(inputs, exits, batch, last)
        assert self._stages is not None
        if self._live is None:
            self._live = Live(self.network, self._stages)
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        visit = _never if batch is None else batch.visit
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

    def _run_whole(
        self, inputs: Sequence[Any], exits: Sequence[int], batch: Answers | None, last: int | None
    ) -> Tensor | None:
        def at(cut: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
                if cut == last:
                    raise _Leave(output)
                assert batch is not None
                stay = batch.visit(cut, output)
                if stay is not None and stay.shape[0] == 0:
                    raise _Leave(None)

            return hook

        watched = [*exits, *([last] if last else [])]
        handles = [self.network.get_submodule(self.exits[cut - 1]).register_forward_hook(at(cut)) for cut in watched]
        try:
            args, kwargs = tree_unflatten(list(inputs), self._spec)
            return select_output(self.network(*args, **kwargs), self.output, type(self.network).__name__)
        except _Leave as leave:
            return leave.found
        finally:
            for handle in handles:
                handle.remove()


class _Leave(BaseException):  # which no network's code catches
    def __init__(self, found: Tensor | None) -> None:
        self.found = found


def _never(cut: int, feature: Tensor) -> Tensor | None:
    return None


class _Static(nn.Module):
    def __init__(self, stage: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.stage, self.head = stage, head

    def forward(self, *args: Any) -> Tensor:
        found: Tensor = self.stage(*args)
        return found if self.head is None else self.head(found)


class _WholeStatic(nn.Module):
    def __init__(self, early: EarlyExitNetwork, exit: int) -> None:
        super().__init__()
        self.early, self.exit = early, exit

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        answer: Tensor = self.early(*args, exit=self.exit, **kwargs)[0]
        return answer


def _structure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    named = f" and {', '.join(map(repr, kwargs))}" if kwargs else ""
    return f"{len(args)} positional{named}"
