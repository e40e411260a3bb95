"""The network as graphs of ATen operators, and the walk that labels every tensor in them."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lightning_compress.channels.graph.operators import Average, Call, run_rule, unknown, values_in
from lightning_compress.channels.graph.units import Layer, Units, Value
from lightning_compress.core.evaluation import caches_off
from lightning_compress.core.example_inputs import ExampleInputs

OUTPUT = "it is an output of the network"
CONTRACTIONS = {  # operators of input, weight and bias
    *("linear", "convolution"),
    *(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3)),
}
AXIS_ORDERS = 3  # for reshapes to (3, heads, width), (heads, 3, width) and (heads, width, 3)


@dataclass(frozen=True, eq=False)
class Place:
    """The nodes of one dimension of a parameter or buffer."""

    tensor: str
    dim: int
    nodes: Tensor


class Places:
    """The nodes of parameters, and of buffers of values or masks; all names of a tensor share its nodes."""

    def __init__(self, model: nn.Module) -> None:
        units = Units()
        self.by_name: dict[str, list[Place]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        first: dict[int, str] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            self.shapes[name] = tuple(tensor.shape)
            if id(tensor) in first:
                self.by_name[name] = self.by_name[first[id(tensor)]]
                continue
            first[id(tensor)] = name
            holds = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
            sizes = tensor.shape if holds or name in self.parameters else ()  # integer buffers are counters or indices
            self.by_name[name] = [Place(name, dim, units.new(n)) for dim, n in enumerate(sizes) if n > 1]
        self.names = list(first.values())
        self.count = units.count

    def all(self) -> list[Place]:
        """Return the places of all tensors, in order."""
        return [place for name in self.names for place in self.by_name[name]]

    def value(self, name: str) -> Value:
        """Return the labelled tensor."""
        shape = self.shapes[name]
        layers = []
        for place in self.by_name[name]:
            view = [1] * len(shape)
            view[place.dim] = shape[place.dim]
            layers.append(Layer(place.nodes.reshape(view), True))
        return Value(shape, tuple(layers), parameter=True)


def export(model: nn.Module, example_inputs: ExampleInputs) -> ExportedProgram:
    """Export the model in its present mode.

    Raises:
        ValueError: The model cannot be exported.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    try:
        with warnings.catch_warnings(), caches_off(model):
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{type(model).__name__} cannot be exported, so its channel groups cannot be found: {first_line} "
            f"{_advice(str(error))}"
        ) from error
    program.graph.eliminate_dead_code()  # such as averages of attention weights that the network does not use
    return program


def _advice(error: str) -> str:
    if "register_dataclass" in error or "pytree" in error:
        return "Register the class that the forward returns with torch.export.register_dataclass."
    if "data-dependent" in error.lower() or "guard" in error.lower():
        return "Take data-dependent control flow out of the forward, or pass a submodule that has none."
    newer = f", or use torch 2.13, which exports more than {torch.__version__}" if torch.__version__ < "2.13" else ""
    return f"Mend what torch.export says, or pass a submodule that can be exported{newer}."


class Walk:
    """One walk through an exported graph, which labels every tensor in it.

    Args:
        program: The exported network.
        places: The nodes of its parameters and buffers.
        units: Collects ties and reasons.
        axis_order: Which axis of several that a reshape makes of one dimension gets the labels.

    Attributes:
        averages: By name of an operator's node in the graph, the channels that it averages over.
        seen: Names of the parameters and buffers that the graph reads.
        reshaped: By module the values before and after the reshapes in its code.
    """

    def __init__(self, program: ExportedProgram, places: Places, units: Units, axis_order: int) -> None:
        self._places, self._units, self._axis_order = places, units, axis_order
        self.averages: dict[str, list[Average]] = {}
        self.seen: set[str] = set()
        self.reshaped: dict[str, list[tuple[Value, Value]]] = {}
        inputs: list[Any] = []
        used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
        for spec in program.graph_signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                assert spec.target is not None
                if spec.arg.name in used:
                    self.seen |= {place.tensor for place in places.by_name[spec.target]}
                inputs.append(places.value(spec.target))
            elif isinstance(constant := program.constants.get(spec.target or ""), Tensor):
                inputs.append(Value(tuple(constant.shape), zero=not bool(constant.any())))
            else:
                inputs.append(None)
        outputs = self._run(program.graph_module, inputs)
        for value in values_in(outputs):
            for layer in value.layers:
                units.freeze(layer.nodes, OUTPUT)

    def _run(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        known: dict[fx.Node, Any] = {}
        incoming = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                given = next(incoming)
                known[node] = _blank_like(node.meta.get("val")) if given is None else given
            elif node.op == "get_attr":
                target = getattr(module, node.target, None)
                known[node] = (
                    target if isinstance(target, fx.GraphModule) else _blank_like(node.meta.get("val", target))
                )
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda one: known[one])
            else:
                arguments = fx.map_arg((node.args, node.kwargs), lambda one: known[one])
                known[node] = self._call(node, *arguments)
        raise AssertionError("the graph has no output")

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        inner = next((arg for arg in args if isinstance(arg, fx.GraphModule)), None)
        if inner is not None and str(target) in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            place = args.index(inner)
            return self._run(inner, list(args[place + 1 :]))
        if not isinstance(target, torch._ops.OpOverload):
            for value in values_in([args, kwargs]):
                for layer in value.layers:
                    self._units.freeze(layer.nodes, f"the operator {target} is unknown to the planner")
            return _blank_like(node.meta.get("val"))
        schema = target._schema
        names = [argument.name for argument in schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        shape = _shape(node.meta.get("val"))
        if isinstance(number := node.meta.get("val"), torch.SymInt):
            return _plain(number)
        name = schema.name.partition("::")[2]
        is_inplace = name.endswith("_") and not name.endswith("__")
        if is_inplace:
            name = name[:-1]
        call = Call(name, arguments, shape, module_of(node), self._units, self._axis_order)
        call.operate = target
        if is_inplace and _is_view(node.args[0]):
            return unknown(call, f"{call.where} writes into a part of another tensor")
        result = run_rule(call)
        if name in ("view", "reshape") and isinstance(result, Value):
            self.reshaped.setdefault(call.module, []).append((call["self"], result))
        if call.averages:
            self.averages.setdefault(node.name, []).extend(call.averages)
        return result


def _is_view(node: Any) -> bool:
    """Return whether a node's value is a part of another tensor, which an operator in place would change as well."""
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        node = node.args[0]
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload) or target._schema.name.endswith("_"):
        return False
    if not any(returned.alias_info is not None for returned in target._schema.returns):
        return False
    base = node.args[0]
    return isinstance(base, fx.Node) and len(base.users) > 1


def module_of(node: fx.Node) -> str:
    """Return the path of the module whose forward calls an operator, "" for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def operator_of(node: Any) -> str:
    """Return the name of the ATen operator that a node calls, without its overload, "" for none."""
    target = node.target if isinstance(node, fx.Node) else None
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


_SOME = 1009  # in place of a size that depends on the data: a large prime, which equals no other size


def _plain(size: int | torch.SymInt) -> int:
    """Return a size as a number, with `_SOME` in place of every symbol that depends on the data."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, _SOME)))


def _shape(val: Any) -> Any:
    if isinstance(val, Tensor):
        return torch.Size(map(_plain, val.shape))
    return [_shape(one) for one in val] if isinstance(val, list | tuple) else None


def _blank_like(val: Any) -> Any:
    if isinstance(val, Tensor):
        return Value(tuple(_shape(val)))
    if isinstance(val, torch.SymInt):
        return _plain(val)
    return [_blank_like(one) for one in val] if isinstance(val, list | tuple) else val
