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

from lightning_compress.channels.graph.walk import CONTRACTIONS, module_of, operator_of
from lightning_compress.quantization.input_grids import InputGrid

log = logging.getLogger(__name__)

_HOOK = ("div", "round", "add", "clamp", "sub", "mul")  # what `on_grid` computes, in its order

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
    found = set()
    for node in list(marked.graph.nodes):
        layer = module_of(node)
        if operator_of(node) not in CONTRACTIONS or layer not in grids or (entry := _entry(node)) is None:
            continue
        grid = grids[layer]
        with marked.graph.inserting_before(node):
            arguments = (entry, grid.scale, grid.zero_point, 2**grid.bits - 1)
            mark = marked.graph.call_function(torch.ops.lightning_compress.on_grid.default, arguments)
        mark.meta = dict(node.args[0].meta)
        node.replace_input_with(node.args[0], mark)
        found.add(layer)
    if lost := sorted(grids.keys() - found):
        log.warning("Not plain linear layers or convolutions in the program, so not in integers: %s.", ", ".join(lost))
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


def _entry(layer: fx.Node) -> fx.Node | None:
    """What the hook before the layer got; None where the layer computes more between it and its product."""
    node = _converted(layer.args[0])
    for operator in reversed(_HOOK):
        if not isinstance(node, fx.Node) or operator_of(node) != operator:
            return None
        node = _converted(node.args[0])
    return node if isinstance(node, fx.Node) else None


def _converted(node: Any) -> Any:
    """What was converted to the dtype that it had: older versions of torch keep such conversions in a program."""
    while operator_of(node) in ("to", "_to_copy") and node.meta["val"].dtype == node.args[0].meta["val"].dtype:
        node = node.args[0]
    return node
