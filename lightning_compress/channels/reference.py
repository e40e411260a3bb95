"""The reference for a cut: the dense graph with zeros in place of some channels, and averages over the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_leaves

from lightning_compress.channels.candidates import Plan
from lightning_compress.channels.graph.operators import Average
from lightning_compress.channels.groups import Drop
from lightning_compress.channels.removal import silenced
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.outputs import run
from lightning_compress.core.tensors import named_tensors


class Reference(fx.Interpreter):
    """Runs an exported graph with averages over the channels that stay.

    An operator that averages over channels gets only those that stay, and its result is zero for the others.

    Args:
        program: The exported network.
        averages: By name of an operator's node in the graph, the channels that it averages over.
        removed: For every axis order a mask of the nodes that leave.
    """

    def __init__(
        self, program: ExportedProgram, averages: Mapping[str, Sequence[Average]], removed: Sequence[Tensor]
    ) -> None:
        super().__init__(program.graph_module)
        self._program, self._averages, self._removed = program, averages, removed

    def outputs(self, model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
        """Return the tensors in the network's output for the model's present parameters and buffers."""
        tensors = named_tensors(model)
        given = iter(tree_leaves(example_inputs if not isinstance(example_inputs, Mapping) else dict(example_inputs)))
        inputs: list[Any] = []
        for spec in self._program.graph_signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                assert spec.target is not None
                inputs.append(tensors[spec.target].detach())
            elif spec.kind == InputKind.USER_INPUT:
                inputs.append(next(given))
            else:
                assert spec.target is not None
                inputs.append(self._program.constants[spec.target])
        results = self.run(*inputs)
        specs = self._program.graph_signature.output_specs
        mine = [one for one, spec in zip(results, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
        return [one for one in mine if isinstance(one, Tensor)]

    def run_node(self, n: fx.Node) -> Any:
        averages = self._averages.get(n.name)
        if not averages:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        assert isinstance(n.target, torch._ops.OpOverload)
        names = [argument.name for argument in n.target._schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        full: Tensor | None = None
        thin: dict[int, Tensor] = {}
        for average in averages:
            name, _, place = average.argument.partition(".")  # "tensors.1" is the second of a list
            value = arguments[name][int(place)] if place else arguments[name]
            dropped = self._removed[average.axis_order][average.nodes.reshape(-1)]
            if average.zero:
                shape = [1] * value.dim()
                shape[average.dim] = -1
                value = value * (~dropped).reshape(shape)
                arguments[name] = _with(arguments[name], int(place), value) if place else value
            elif bool(dropped.any()):
                full = value
                before = thin.get(average.dim, torch.arange(len(dropped)))
                thin[average.dim] = before[~dropped[before]]
        if not thin:
            return n.target(**arguments)
        assert full is not None
        for dim, kept in thin.items():
            per_channel = n.target._schema.name.endswith(
                ("batch_norm", "instance_norm")
            )  # vectors belong to dimension 1
            arguments = {
                name: value if per_channel and name != "input" else _narrow(value, dim, kept, full, name)
                for name, value in arguments.items()
            }
        result = n.target(**arguments)
        return _widen(result, thin, full) if n.target._schema.name.endswith(("norm", "softmax")) else result


def _with(values: Sequence[Any], place: int, value: Any) -> list[Any]:
    return [value if at == place else one for at, one in enumerate(values)]


def _narrow(value: Any, dim: int, kept: Tensor, full: Tensor, name: str) -> Any:
    if name == "normalized_shape":
        place = dim - (full.dim() - len(value))
        return [len(kept) if at == place else size for at, size in enumerate(value)]
    if not isinstance(value, Tensor):
        return value
    if value.dim() == full.dim():
        return value.index_select(dim, kept)
    at = dim - (full.dim() - value.dim()) if value.dim() > 1 or dim == full.dim() - 1 else 0
    return value.index_select(at, kept)


def _widen(result: Tensor, thin: Mapping[int, Tensor], full: Tensor) -> Tensor:
    for dim, kept in thin.items():
        shape = list(result.shape)
        shape[dim] = full.shape[dim]
        result = result.new_zeros(shape).index_copy(dim, kept, result)
    return result


def dense_without(
    model: nn.Module, example_inputs: ExampleInputs, drop: Drop, plan: Plan | None = None
) -> list[Tensor]:
    """Return the output of the dense network with zeros in place of some channels.

    Inexact groups need the plan, so that averages count only the channels that stay. With a plan the model must be in
    the sandbox, because zeros are written into its tensors.
    """
    with silenced(model, drop, in_place=plan is not None):
        if all(group.exact for group, _ in drop):
            return run(model, example_inputs)
        assert plan is not None, "inexact groups need the plan"
        averages: dict[str, list[Average]] = {}
        for walk in plan.walks:
            for name, some in walk.averages.items():
                averages.setdefault(name, []).extend(some)
        return Reference(plan.program, averages, plan.removed(drop)).outputs(model, example_inputs)
