"""A network as one graph of ATen operators in which the ends of named layers are known."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_leaves

from lightning_compress.core.axes import BATCH, Axes, exported
from lightning_compress.core.evaluation import caches_off, entries_restored, evaluating
from lightning_compress.core.hooks import hooked
from lightning_compress.core.outputs import select_output

_MOST = 2**30  # samples: before torch 2.7 a slice asks whether there are as many as there are integers
_SAMPLES = 3  # in the traced batch: torch.export makes constants of sizes 0 and 1


class SplitError(ValueError):
    """A network that cannot be split into stages, with the reason and, where it is one cut's, the layer."""


@torch.library.custom_op("lightning_compress::layer_mark", mutates_args=())
def _layer_mark(x: Tensor, layer: str, ends: bool) -> None:
    """Mark where a layer begins to read a tensor, or ends with one, in a graph; the graph that is run has no marks."""


@_layer_mark.register_fake
def _(x: Tensor, layer: str, ends: bool) -> None: ...


_LAYER_MARK = torch.ops.lightning_compress.layer_mark.default
fx.node.has_side_effect(_LAYER_MARK)  # so that nothing removes it as dead code


@dataclass(frozen=True)
class Mark:
    """Where a layer begins or ends.

    Attributes:
        node: Of what it reads or returns.
        position: How many nodes of the graph come before.
        event: Counts marks, in the order in which layers begin and end.
    """

    node: fx.Node
    position: int
    event: int


@dataclass(frozen=True)
class Trace:
    """The graph of a network, for batches of any size.

    Attributes:
        module: Has the graph.
        nodes: Of the graph, in order, without its output.
        names: The nodes of parameters, buffers and constants, and their names.
        constants: Tensors that belong to the network's code, by name.
        inputs: The nodes of the example inputs' leaves, in order.
        answer: The node of the network's output.
        begins: Of the layers that got a tensor, with the first one; those that ran twice have two.
        ends: Of the layers that returned a tensor, or first among others; those that ran twice have two.
        symbol: Stands for the number of samples in the sizes of tensors.
    """

    module: fx.GraphModule
    nodes: list[fx.Node]
    names: dict[fx.Node, str]
    constants: dict[str, Tensor]
    inputs: list[fx.Node]
    answer: fx.Node
    begins: dict[str, list[Mark]]
    ends: dict[str, list[Mark]]
    symbol: Any

    def affine(self, size: Any) -> tuple[int, int] | None:
        """Return (a, b) of a size that is a times the number of samples plus b, and None for any other."""
        if isinstance(size, int):
            return 0, size
        expression = size.node.expr
        try:
            one, two, *more = (int(expression.xreplace({self.symbol: n})) for n in (1, 2, 3, 8, 61))
        except TypeError:  # other symbols
            return None
        a, b = two - one, 2 * one - two
        return (a, b) if more == [a * n + b for n in (3, 8, 61)] else None


def trace(
    network: nn.Module, axes: Axes, layers: Iterable[str], output: str | int | None, *, functional: bool = False
) -> Trace:
    """Export a network in evaluation mode, with marks where layers end.

    Args:
        network: Stays as it is.
        axes: Of its example inputs.
        layers: Qualified names of modules.
        output: Which tensor of the network's output is the answer, as for `select_output`.
        functional: Replace operators that write into their inputs by others that do not.

    Raises:
        SplitError: The network cannot be exported for batches of any size.
    """
    try:
        with ExitStack() as back:
            back.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for context in (evaluating(network), entries_restored(network), caches_off(network)):
                back.enter_context(context)
            back.enter_context(torch.compiler.set_stance("force_eager"))
            back.enter_context(_answering(network, output))
            back.enter_context(_marking(network, layers))
            program = exported(network, axes.resized({BATCH: _SAMPLES}), axes, {BATCH: Dim(BATCH, max=_MOST)})
            if functional and any(map(writes, program.graph.nodes)):
                program = program.run_decompositions({})
    except Exception as error:  # whatever the network's code or torch.export raises
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        newer = (
            f" Or use torch 2.13, which exports more than {torch.__version__}." if torch.__version__ < "2.13" else ""
        )
        raise SplitError(
            f"torch.export cannot trace {type(network).__name__} for batches of any size: "
            f"{' '.join(lines[:2])[:300] or type(error).__name__}{newer}"
        ) from error
    return _read(program, axes, functional)


@contextmanager
def _answering(network: nn.Module, output: str | int | None) -> Iterator[None]:
    """Have the network return the one tensor that is its answer."""
    own, forward = vars(network).get("forward"), network.forward

    @wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Tensor:
        return select_output(forward(*args, **kwargs), output, type(network).__name__)

    vars(network)["forward"] = answer
    try:
        yield
    finally:
        del vars(network)["forward"]
        if own is not None:
            vars(network)["forward"] = own


def _marking(network: nn.Module, layers: Iterable[str]) -> AbstractContextManager[None]:
    def begins(name: str) -> Any:
        def mark(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if (x := first_tensor((*args, *kwargs.values()))) is not None:
                _LAYER_MARK(x, name, False)

        return mark

    def ends(name: str) -> Any:
        def mark(_module: nn.Module, _args: Any, output: Any) -> None:
            if (first := first_tensor(tree_leaves(output))) is not None:
                _LAYER_MARK(first, name, True)

        return mark

    modules = {name: network.get_submodule(name) for name in layers}
    return hooked(
        *(one.register_forward_pre_hook(begins(name), with_kwargs=True, prepend=True) for name, one in modules.items()),
        *(one.register_forward_hook(ends(name)) for name, one in modules.items()),
    )


def writes(node: fx.Node) -> bool:
    """Whether an operator writes into a tensor that it reads."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """Return the first tensor among values."""
    return next((one for one in values if isinstance(one, Tensor)), None)


def _read(program: ExportedProgram, axes: Axes, functional: bool) -> Trace:
    signature = program.graph_signature
    if any(one.kind != OutputKind.USER_OUTPUT for one in signature.output_specs):
        raise SplitError("The network writes into its buffers or inputs.")
    graph = program.graph
    for node in graph.nodes:  # torch.export forgets that a mark uses the network's output
        for source in node.all_input_nodes:
            source.users.setdefault(node, None)
    for node in list(graph.nodes):
        if node._erased:
            continue
        _tidy(graph, node, functional)
    begins: dict[str, list[Mark]] = {}
    ends: dict[str, list[Mark]] = {}
    nodes: list[fx.Node] = []
    event = 0
    for node in list(graph.nodes):
        if node.target is _LAYER_MARK:
            source, layer, at_end = node.args
            (ends if at_end else begins).setdefault(layer, []).append(Mark(source, len(nodes), event))
            event += 1
            graph.erase_node(node)
        elif node.op != "output":
            nodes.append(node)
    by_name = {node.name: node for node in nodes if node.op == "placeholder"}
    specs = [(by_name[spec.arg.name], spec) for spec in signature.input_specs if spec.arg.name in by_name]
    inputs = [node for node, spec in specs if spec.kind is InputKind.USER_INPUT]
    names = {node: str(spec.target) for node, spec in specs if spec.kind is not InputKind.USER_INPUT}
    first = next(i for i, named in enumerate(axes.named) if BATCH in named.values())
    dim = next(dim for dim, name in axes.named[first].items() if name == BATCH)
    output = next(node for node in graph.nodes if node.op == "output")
    return Trace(
        module=program.graph_module,
        nodes=nodes,
        names=names,
        constants={
            str(spec.target): program.constants[str(spec.target)]
            for _, spec in specs
            if spec.kind is InputKind.CONSTANT_TENSOR
        },
        inputs=inputs,
        answer=output.args[0][0],
        begins=begins,
        ends=ends,
        symbol=inputs[first].meta["val"].shape[dim].node.expr,
    )


def _tidy(graph: fx.Graph, node: fx.Node, functional: bool) -> None:
    """Erase checks and dropout, which do nothing, and have the parts of a list follow it at once.

    What is made functional has copies in place of dropout, copies for views, and batch norms that return a tuple.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    name = target._schema.name.partition("::")[2]
    if ("_assert_" in name or "sym_constrain" in name) and not node.users:
        graph.erase_node(node)
    elif (name in ("dropout", "feature_dropout", "alpha_dropout") and node.args[2] is False) or (
        functional
        and (
            (name == "clone" and (not node.kwargs or all(map(_reshapes, node.users))))
            or (name in ("to", "alias", "detach") and _same(node, node.args[0]))
        )
    ):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # the tensor
        graph.erase_node(node)
    elif functional and _reshapes(node):
        node.target = torch.ops.aten.reshape.default  # strides may be others than those of the trace
    elif target is _NORM and all(user.args[1] == 0 for user in node.users):
        _one_output(graph, node)
    elif isinstance(node.meta.get("val"), (list, tuple)):
        for part in reversed([user for user in node.users if user.target is operator.getitem]):
            node.append(part)


def _same(node: fx.Node, source: Any) -> bool:
    """Whether a conversion converts nothing."""
    mine, its = node.meta.get("val"), source.meta.get("val")
    if not isinstance(mine, Tensor) or not isinstance(its, Tensor):
        return False
    return (mine.dtype, mine.device) == (its.dtype, its.device) and "memory_format" not in node.kwargs


def _reshapes(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def _one_output(graph: fx.Graph, node: fx.Node) -> None:
    """Put a batch norm that returns one tensor in the place of one that returns a tuple."""
    x, weight, bias, mean, variance, momentum, eps = node.args
    with graph.inserting_before(node):
        args = (x, weight, bias, mean, variance, False, momentum, eps, True)
        norm = graph.call_function(torch.ops.aten.batch_norm.default, args)
    norm.meta = node.meta | {"val": node.meta["val"][0]}
    for part in list(node.users):
        part.replace_all_uses_with(norm)
        graph.erase_node(part)
    graph.erase_node(node)
