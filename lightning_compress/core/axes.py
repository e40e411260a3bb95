"""The dynamic dimensions of a network's inputs: those that may have other sizes than in the example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call

BATCH = "batch"


@dataclass(frozen=True)
class Axes:
    """Example inputs, flat, and the names of their dynamic dimensions.

    Attributes:
        leaves: The leaves of the nested inputs, in order.
        spec: Their nesting.
        named: For each leaf, the names of its dynamic dimensions.
    """

    leaves: list[Any]
    spec: TreeSpec
    named: list[dict[int, str]]

    @classmethod
    def of(
        cls, model: nn.Module, example_inputs: ExampleInputs, dynamic: Mapping[str | int, Mapping[int, str]]
    ) -> Axes:
        """Find the batch dimensions of the inputs of a model in evaluation mode, and add those that a user has named.

        Raises:
            ValueError: `dynamic` names an unknown input or dimension, or the model runs with one batch size only.
        """
        plain = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
        leaves, spec = tree_flatten(plain)
        named = _named(model, plain, leaves, dynamic)
        n = batch_size(plain)
        first = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        batched = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == n]
        batched = [i for i in batched if 0 not in named[i]]
        square = {i for i in batched if leaves[i].dim() > 1 and leaves[i].shape[0] == leaves[i].shape[1] and i != first}
        error: Exception | None = None
        for without in [set(), square, *({i} for i in batched if i != first)]:
            axes = cls(
                leaves,
                spec,
                [one | ({0: BATCH} if i in batched and i not in without else {}) for i, one in enumerate(named)],
            )
            try:
                with torch.no_grad():
                    call(model, axes.resized({BATCH: n + 1}))
            except Exception as failure:  # whatever the model's code raises
                error = error or failure
                continue
            return axes
        raise ValueError(
            f"{type(model).__name__} does not run with {n + 1} samples, made of the {n} of the example inputs: "
            f"{next(iter(str(error).strip().splitlines()), type(error).__name__)} The first dimension of the first "
            f"tensor must be the batch: pass example_inputs batch first, with which the model runs at every batch size."
        ) from error

    @classmethod
    def of_program(cls, program: ExportedProgram) -> Axes:
        """Return the example inputs of a program, with their dynamic dimensions."""
        leaves, spec = tree_flatten(program.example_inputs)
        values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
        inputs = [values.get(name) for name in program.graph_signature.user_inputs]
        named = [
            {dim: str(size) for dim, size in enumerate(value.shape) if not str(size).isdigit()}  # a symbol
            if isinstance(value, Tensor)
            else {}
            for value in inputs
        ]
        return cls(leaves, spec, named)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each dynamic dimension in the example."""
        return {
            name: leaf.shape[dim]
            for leaf, one in zip(self.leaves, self.named, strict=True)
            for dim, name in one.items()
        }

    def resized(self, sizes: Mapping[str, int]) -> Any:
        """Return the inputs in other sizes; entries are repeated from the first on where a size grows."""
        leaves = list(self.leaves)
        for i, named in enumerate(self.named):
            for dim, name in named.items():
                if name in sizes:
                    leaves[i] = leaves[i].index_select(dim, torch.arange(sizes[name]) % leaves[i].shape[dim])
        return tree_unflatten(leaves, self.spec)

    def others(self, run: Callable[[Any], Any]) -> Any:
        """Return the inputs in other sizes, near those of the example, with which `run` succeeds.

        Raises:
            ValueError: `run` fails with all other sizes that were tried.
        """
        sizes = self.sizes
        near = [[3] if name == BATCH else _near(size) for name, size in sizes.items()]
        error: Exception | None = None
        for chosen in product(*near):
            inputs = self.resized(dict(zip(sizes, chosen, strict=True)))
            try:
                with torch.no_grad():
                    run(inputs)
            except Exception as failure:  # whatever the model's code raises
                error = error or failure
                continue
            return inputs
        raise ValueError(
            f"The network runs with no other sizes of {', '.join(map(repr, sizes))} than those of the example inputs, "
            f"{tuple(sizes.values())}: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
        ) from error


def _near(size: int) -> list[int]:
    return [one for one in (size - 1, size + 1, 2 * size, size // 2) if one > 1]


def arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def exported(model: nn.Module, inputs: ExampleInputs, axes: Axes, dims: Mapping[str, Any]) -> ExportedProgram:
    """Export the model in its present mode; `dims` has torch.export's dimension for each name of a dynamic one."""
    args, kwargs = arguments(inputs)
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf, named in zip(tree_leaves((args, kwargs)), axes.named, strict=True):
        if named:
            shapes[leaf] = {dim: dims[name] for dim, name in named.items()}
    with spelled_out(model, args, kwargs):
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


@contextmanager
def spelled_out(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Give a forward of *args or **kwargs a signature with names, by which torch.export finds dynamic dimensions."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = {one.kind for one in parameters}
    if not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        yield
        return
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    spelled: list[inspect.Parameter] = []
    for one in parameters:
        if one.kind is one.VAR_POSITIONAL:
            names = [f"{one.name}_{i}" for i in range(len(bound.get(one.name, ())))]
            spelled += [one.replace(name=name, kind=one.POSITIONAL_ONLY) for name in names]
        elif one.kind is one.VAR_KEYWORD:
            spelled += [one.replace(name=name, kind=one.KEYWORD_ONLY) for name in bound.get(one.name, {})]
        elif one.kind is one.POSITIONAL_OR_KEYWORD and one.VAR_POSITIONAL in kinds:
            spelled.append(one.replace(kind=one.POSITIONAL_ONLY))
        else:
            spelled.append(one)
    own, forward = vars(model).get("forward"), model.forward

    @wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    named.__signature__ = inspect.Signature(spelled)  # type: ignore[attr-defined]  # inspect reads it
    vars(model)["forward"] = named
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def _named(
    model: nn.Module, example_inputs: ExampleInputs, leaves: list[Any], dynamic: Mapping[str | int, Mapping[int, str]]
) -> list[dict[int, str]]:
    args, kwargs = arguments(example_inputs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    inputs: dict[Any, Any] = {**bound, **dict(enumerate(args)), **kwargs}
    named: list[dict[int, str]] = [{} for _ in leaves]
    for which, names in dynamic.items():
        place = next((i for i, leaf in enumerate(leaves) if leaf is inputs.get(which)), None)
        if place is None or not isinstance(leaves[place], Tensor):
            raise ValueError(
                f"dynamic names {which!r}, no tensor among the inputs: expected one of {', '.join(map(repr, inputs))}."
            )
        for dim, name in names.items():
            axis = dim + leaves[place].dim() if dim < 0 else dim
            if not 0 <= axis < leaves[place].dim():
                raise ValueError(
                    f"dynamic names dimension {dim} of {which!r}, whose shape is {tuple(leaves[place].shape)}."
                )
            named[place][axis] = name
    return named
