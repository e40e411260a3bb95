"""Cut a network at layers, so that a part of a batch can leave there, and prove the cut on examples.

    stages = split(network, ["layer1", "layer2"], example_inputs)

`torch.export` makes one graph of the network for batches of any size. A cut stands where a layer returns; whatever was
computed before it and is used after it crosses it: for the samples that stay where it has a dimension of samples, as it
is where it has none. Sizes that depend on the number of samples are computed anew. The stages read the weights of the
network when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_compress.core.axes import BATCH, Axes
from lightning_compress.core.evaluation import caches_off, entries_restored, evaluating, take_rounding_away
from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.hooks import hooked
from lightning_compress.core.outputs import compare, select_output
from lightning_compress.core.tensors import named_tensors
from lightning_compress.stages.extract import Stage
from lightning_compress.stages.stages import Stages
from lightning_compress.stages.trace import SplitError, trace

__all__ = ["MixedSamplesError", "SplitError", "Stages", "split"]

_TRIED = 5  # samples on which a split is proved


class MixedSamplesError(SplitError):
    """A network whose output for a sample depends on the other samples of the batch."""


class _SharedMemoryError(Exception):
    """Two tensors that cross a cut are one in memory, and are written to after it."""


def split(
    network: nn.Module, layers: Sequence[str], example_inputs: ExampleInputs, *, output: str | int | None = None
) -> Stages:
    """Cut a network into stages that end where the named layers return.

    Args:
        network: Stays as it is. The stages are those of its evaluation mode.
        layers: Qualified names of modules that run exactly once, in the order in which they return.
        example_inputs: Some samples, batch first. Other inputs must have their shapes but for the number of samples.
        output: Which tensor of the network's output is the answer: key, position or attribute.

    Raises:
        ValueError: A layer does not exist, does not run, runs twice, returns no tensor, or the order is another.
        SplitError: The network cannot be split there, or the stages were tried and computed something else.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> stages = split(network, ["1"], torch.randn(3, 4))
        >>> [node.name for node in stages.crossing[1]]
        ['relu']
    """
    axes = axes_of(network, example_inputs, output)
    with _unrounded(network) as rounds:
        examples = Examples(network, layers, axes, output)
        stages = Stages(trace(network, axes, layers, output), layers)
        functional = False
        try:
            _prove(stages, network, examples)
        except _SharedMemoryError:
            functional = True
            stages = Stages(trace(network, axes, layers, output, functional=True), layers)
            _prove(stages, network, examples)
    if not rounds:
        return stages
    rounding = Stages(trace(network, axes, layers, output, functional=functional), layers)
    for cut, nodes in enumerate(stages.crossing):
        pairs = zip(rounding.crossing[cut], nodes, strict=False)
        rounding.rows.update({mine: stages.rows[other] for mine, other in pairs})
    with running(network):
        _try_together(rounding, network, examples)
    return rounding


@contextmanager
def _unrounded(network: nn.Module) -> Iterator[bool]:
    """Run a network without the hooks that round inputs: a sample alone differs in the last bit, and is rounded away.

    Yields whether there are any.
    """
    with running(network):
        before = sum(len(module._forward_pre_hooks) for module in network.modules())
        take_rounding_away(network)
        yield before > sum(len(module._forward_pre_hooks) for module in network.modules())


def axes_of(network: nn.Module, example_inputs: ExampleInputs, output: str | int | None) -> Axes:
    """Find the dimensions of samples among the inputs.

    Raises:
        SplitError: The network runs with one number of samples only.
    """
    with running(network):
        select_output(call(network, example_inputs), output, type(network).__name__)
        try:
            return Axes.of(network, example_inputs, {})
        except ValueError as error:
            raise SplitError(str(error)) from error


@contextmanager
def running(network: nn.Module) -> Iterator[None]:
    """Run a network in evaluation mode, without torch.compile, whose code runs no hooks, and put back what changes."""
    eager = torch.compiler.set_stance("force_eager")
    with evaluating(network), entries_restored(network), caches_off(network), eager:
        yield


class Examples:
    """Different samples, and what the network computes of each of them alone.

    Args:
        network: Runs a few times.
        layers: Whose outputs are kept.
        axes: Of the example inputs, from which the samples are made.
        output: Which tensor is the answer.

    Raises:
        ValueError: A layer is not one that a cut can follow.
        MixedSamplesError: A sample's output depends on the others.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], axes: Axes, output: str | int | None) -> None:
        self.network, self.layers, self.axes, self.output = network, layers, axes, output
        known = dict(network.named_modules(remove_duplicate=False))
        if missing := [name for name in layers if not name or name not in known]:
            raise ValueError(f"{type(network).__name__} has no layer {missing[0]!r}: pass the names of modules in it.")
        self.leaves = different(axes)
        with _unrounded(network):
            self.together = self.computed(range(_TRIED))
            try:
                self.alone = [self.computed([i]) for i in range(_TRIED)]
            except Exception as error:  # whatever the network's code raises
                raise SplitError(f"{type(network).__name__} does not run with one sample: {error}") from error
        for i, alone in enumerate(self.alone):
            if difference := differ([alone[-1]], [self.together[-1][i : i + 1]]):
                raise MixedSamplesError(
                    f"{type(network).__name__} mixes the samples of a batch, so that none can leave before the others: "
                    f"of one sample alone, {difference}."
                )

    def of(self, samples: Iterable[int]) -> list[Any]:
        """Return the leaves of the inputs with some of the samples."""
        index = torch.tensor(list(samples))
        return [
            leaf.index_select(0, index.to(leaf.device)) if BATCH in named.values() else leaf
            for leaf, named in zip(self.leaves, self.axes.named, strict=True)
        ]

    def computed(self, samples: Iterable[int]) -> list[Tensor]:
        """Return the layers' outputs and the answer, as the network computes them."""
        found: list[tuple[str, Any]] = []

        def watch(name: str) -> Callable[..., None]:
            def keep(_module: nn.Module, _args: Any, output: Any) -> None:
                found.append((name, output.detach().clone() if isinstance(output, Tensor) else output))

            return keep

        with hooked(*(self.network.get_submodule(name).register_forward_hook(watch(name)) for name in self.layers)):
            inputs = tree_unflatten(self.of(samples), self.axes.spec)
            answer = select_output(call(self.network, inputs), self.output, type(self.network).__name__)
        _check_layers(self.layers, found)
        return [*(output for _, output in found), answer.detach()]


def _check_layers(layers: Sequence[str], found: Sequence[tuple[str, Any]]) -> None:
    order = [name for name, _ in found]
    for name in layers:
        if order.count(name) != 1:
            times = f"runs {order.count(name)} times" if name in order else "does not run"
            raise ValueError(
                f"The layer {name!r} {times} in one forward pass: a cut can follow a layer that runs exactly once, "
                f"through its __call__."
            )
    for name, output in found:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"The layer {name!r} returns a {type(output).__name__}: a cut can follow a layer that returns one "
                f"tensor."
            )
    if order != list(layers):
        raise ValueError(f"The layers {list(layers)} are not in the order in which their layers return: {order}.")


def different(axes: Axes) -> list[Any]:
    """Make samples that differ of the example's, which may be equal, or zeros."""
    leaves, _ = tree_flatten(axes.resized({BATCH: _TRIED}))
    generator = torch.Generator().manual_seed(0)
    made = []
    for leaf, named in zip(leaves, axes.named, strict=True):
        if BATCH not in named.values():
            made.append(leaf)
        elif leaf.is_floating_point():
            spread = float(leaf.double().std()) if leaf.numel() > 1 else 0.0
            noise = torch.randn(leaf.shape, generator=generator).to(leaf)
            made.append(leaf + noise * spread if spread > 0 else noise if spread == 0 else leaf)
        elif leaf.dim() > 1:
            made.append(torch.stack([row.roll(i, -1) for i, row in enumerate(leaf)]))
        else:
            made.append(leaf)
    return made


def differ(got: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Return None if tensors agree but for rounding, and else a text that says where they differ."""
    for one, other in zip(got, expected, strict=True):
        tolerance = torch.finfo(other.dtype).eps ** 0.5 if other.is_floating_point() else 0.0
        if one.dtype != other.dtype:
            return f"its type is {one.dtype}, not {other.dtype}"
        if difference := compare([one.detach()], [other.detach()], tolerance):
            return difference
    return None


def _prove(stages: Stages, network: nn.Module, examples: Examples) -> None:
    """Try stages, with random samples leaving at every cut, against samples one by one.

    Raises:
        SplitError: They compute something else.
    """
    execute = executor(network, stages)
    cuts = range(1, len(stages.layers) + 1)

    def inputs(samples: Iterable[int]) -> list[Tensor]:
        return [leaf for leaf in examples.of(samples) if isinstance(leaf, Tensor)]

    def carried(samples: Iterable[int]) -> list[list[Tensor]]:
        found: list[list[Tensor]] = []
        now = inputs(samples)
        for cut in cuts:
            _, *now = execute(stages.between(cut - 1, cut), now)
            if stages.writes_after(cut):
                memory = [one.untyped_storage().data_ptr() for one in now]
                if len(set(memory)) < len(memory):
                    raise _SharedMemoryError
            found.append([one.clone() for one in now])
        return found

    with running(network):
        try:
            full = carried(range(_TRIED))
            for samples in ([3], [4, 1, 2]):
                for cut, (some, all_) in enumerate(zip(carried(samples), full, strict=True), 1):
                    _check_crossing(stages, cut, some, all_, torch.tensor(samples))
            for seed in range(4):
                _try(stages, execute, inputs(range(_TRIED)), examples, seed)
        except SplitError:
            raise
        except RuntimeError as error:  # a size that the graph does not take
            line = next(iter(str(error).strip().splitlines()), "")
            raise SplitError(f"The stages of {type(network).__name__} do not run with fewer samples: {line}") from error


def _try_together(stages: Stages, network: nn.Module, examples: Examples) -> None:
    """Compare what the stages compute of a batch that nobody leaves with what the network does."""
    found: list[Tensor] = []
    inputs = [leaf for leaf in examples.of(range(_TRIED)) if isinstance(leaf, Tensor)]
    cuts = range(1, len(stages.layers) + 1)
    answer = stages.run(executor(network, stages), inputs, cuts, lambda _, feature: found.append(feature.clone()))
    assert answer is not None
    if difference := differ([*found, answer], examples.computed(range(_TRIED))):
        raise SplitError(f"The stages were tried, and something is wrong: {difference}.")


def _check_crossing(stages: Stages, cut: int, some: Sequence[Tensor], all_: Sequence[Tensor], samples: Tensor) -> None:
    """Compare what crosses a cut if only some samples run with what is gathered of all."""
    for node, one, other in zip(stages.crossing[cut], some, all_, strict=True):
        rows = stages.rows[node]
        index = samples.to(other.device)
        difference = differ([one], [rows.take(other, index) if rows else other])
        if difference and rows and rows.each > 1:
            turns = replace(rows, together=False)
            difference = differ([one], [turns.take(other, index)])
            stages.rows[node] = turns
        if difference:
            raise SplitError(
                f"{node.name}, which crosses the cut at {stages.layers[cut - 1]!r}, is not the same for a part of "
                f"the samples: {difference}."
            )


def _try(
    stages: Stages,
    execute: Callable[[Stage, Sequence[Tensor]], Any],
    inputs: Sequence[Tensor],
    examples: Examples,
    seed: int,
) -> None:
    """Have random samples leave, none with seed 0, and compare all that is computed."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.arange(_TRIED)

    def check(what: str, at: int, got: Tensor) -> None:
        expected = torch.cat([examples.alone[i][at] for i in left.tolist()])
        if difference := differ([got], [expected]):
            raise SplitError(f"The stages were tried, and {what} is wrong: {difference}.")

    def visit(cut: int, feature: Tensor) -> Tensor | None:
        nonlocal left
        check(f"what {stages.layers[cut - 1]!r} returns", cut - 1, feature)
        if seed == 0:
            return None
        stay = torch.randperm(len(left), generator=generator)[: max(1, len(left) - 1 - seed % 2)].sort().values
        left = left[stay]
        return stay.to(feature.device)

    answer = stages.run(execute, inputs, range(1, len(stages.layers) + 1), visit)
    assert answer is not None
    check("the answer", -1, answer)


def executor(network: nn.Module, stages: Stages) -> Callable[[Stage, Sequence[Tensor]], Any]:
    """Return a function that runs a stage with the present tensors of a network."""
    tensors = stages.graph.constants | named_tensors(network)
    return lambda stage, carried: stage.module(*carried, *(tensors[name] for name in stage.names))
