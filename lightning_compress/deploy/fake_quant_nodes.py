"""Replaces the rounding of quantized inputs in an exported program by one operator, and translates it to ONNX.

In the exported program the rounding of a hook consists of ordinary arithmetic nodes. In ONNX it must be QuantizeLinear
and DequantizeLinear, from which onnxruntime chooses integer kernels.
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

_HOOK = ("div", "round", "add", "clamp", "sub", "mul")  # the operators of `on_grid`, in their order

torch.library.define("lightning_compress::on_grid", "(Tensor x, float scale, int zero_point, int top) -> Tensor")
torch.library.register_fake("lightning_compress::on_grid", lambda x, scale, zero_point, top: torch.empty_like(x))


def mark_inputs(program: ExportedProgram, grids: Mapping[str, InputGrid]) -> ExportedProgram:
    """Return a copy of a program in which one operator replaces the rounding before each quantized layer.

    Without grids, the program itself is returned.

    Args:
        program: The exported program, which is not changed.
        grids: The grid of each quantized input, by the qualified name of the layer.
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
        log.warning(
            "These layers are not plain linear layers or convolutions in the exported program, so they compute in "
            "float: %s.",
            ", ".join(lost),
        )
    marked.graph.eliminate_dead_code()
    marked.graph_module.recompile()
    return marked


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the function that writes the operator as ONNX, in the form that the exporter takes."""
    import onnxscript

    op: Any = onnxscript.opset18

    def on_grid(x, scale: float, zero_point: int, top: int):  # type: ignore[no-untyped-def]  # the exporter reads types
        step = op.Constant(value_float=scale)
        zero = op.Cast(op.Constant(value_int=zero_point), to=2)  # uint8
        q = op.QuantizeLinear(x, step, zero)
        if top < 255:  # QuantizeLinear itself clips to 255
            q = op.Min(q, op.Cast(op.Constant(value_int=top), to=2))
        return op.DequantizeLinear(q, step, zero)

    return {torch.ops.lightning_compress.on_grid.default: on_grid}


def _entry(layer: fx.Node) -> fx.Node | None:
    """Return the node that the hook before a layer rounds; None if other operators are between hook and product."""
    node = _converted(layer.args[0])
    for operator in reversed(_HOOK):
        if not isinstance(node, fx.Node) or operator_of(node) != operator:
            return None
        node = _converted(node.args[0])
    return node if isinstance(node, fx.Node) else None


def _converted(node: Any) -> Any:
    """Skip conversions to the same dtype, which older versions of torch leave in a program."""
    while operator_of(node) in ("to", "_to_copy") and node.meta["val"].dtype == node.args[0].meta["val"].dtype:
        node = node.args[0]
    return node
