"""Inputs on a grid, as one operator of the program, and that as ONNX has it.

In the exported program a hook's rounding is arithmetic like any other. ONNX says it in two operators, for which
onnxruntime looks when it chooses integer kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lightning_compress.core.graphs import CONTRACTIONS, module_of, operator_of
from lightning_compress.quantization.input_grids import InputGrid

log = logging.getLogger(__name__)

torch.library.define("lightning_compress::on_grid", "(Tensor x, float scale, int zero_point, int top) -> Tensor")


torch.library.register_fake("lightning_compress::on_grid", lambda x, scale, zero_point, top: torch.empty_like(x))


def mark_inputs(program: ExportedProgram, grids: Mapping[str, InputGrid]) -> ExportedProgram:
    """Return the program with one operator for what a hook computes before a layer; a copy, if there are grids.

    Args:
        program: It stays as it is.
        grids: By qualified name of the layer, whose hook rounds to it.
    """
    if not grids:
        return program
    marked: ExportedProgram = program.run_decompositions({})
    signature = marked.graph_signature
    state = {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }
    found = set()
    for node in list(marked.graph.nodes):
        layer = module_of(node)
        if operator_of(node) not in CONTRACTIONS or layer not in grids:
            continue
        grid = grids[layer]
        with marked.graph.inserting_before(node):
            arguments = (_entry(node, state), grid.scale, grid.zero_point, 2**grid.bits - 1)
            mark = marked.graph.call_function(torch.ops.lightning_compress.on_grid.default, arguments)
        mark.meta = dict(node.args[0].meta)
        node.replace_input_with(node.args[0], mark)
        found.add(layer)
    if lost := sorted(grids.keys() - found):
        log.warning("Not in the program as a linear layer or convolution, so not in integers: %s.", ", ".join(lost))
    marked.graph.eliminate_dead_code()
    marked.graph_module.recompile()
    return marked


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what the exporter needs to write the operator as ONNX."""
    import onnxscript

    op: Any = onnxscript.opset18

    def on_grid(x, scale: float, zero_point: int, top: int):  # type: ignore[no-untyped-def]  # the exporter reads types
        step = op.Constant(value_float=scale)
        zero = op.Cast(op.Constant(value_int=zero_point), to=2)  # uint8
        q = op.QuantizeLinear(x, step, zero)
        if top < 255:  # of a byte; QuantizeLinear clips to its ends
            q = op.Min(q, op.Cast(op.Constant(value_int=top), to=2))
        return op.DequantizeLinear(q, step, zero)

    return {torch.ops.lightning_compress.on_grid.default: on_grid}


def _entry(layer: fx.Node, state: set[str]) -> fx.Node:
    """The one tensor that the hooks before the layer got."""
    call, pending, entries = _call(layer), [layer.args[0]], set()
    while pending:
        node = pending.pop()
        assert isinstance(node, fx.Node)
        if _call(node) == call:
            pending += node.all_input_nodes
        elif node.name not in state:
            entries.add(node)
    (entry,) = entries
    return entry


def _call(node: fx.Node) -> str:
    """Tells one call of a module from the next."""
    return str(next(reversed(node.meta.get("nn_module_stack") or {"": None})))
