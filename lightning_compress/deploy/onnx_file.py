"""Writes a network to an ONNX file, with integers for quantized weights and inputs, and checks it with onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lightning_compress.core.axes import Axes, arguments
from lightning_compress.core.example_inputs import ExampleInputs, tensors
from lightning_compress.core.files import replacing
from lightning_compress.deploy.fake_quant_nodes import mark_inputs, translations
from lightning_compress.deploy.program import compare
from lightning_compress.quantization.input_grids import InputGrid

log = logging.getLogger(__name__)

_ROUNDING = {8: 0.1, 4: 0.5, 2: 1.0}  # fewest bits: largest error, relative to the outputs' root mean square


def save_onnx(
    program: ExportedProgram,
    path: str | Path,
    *,
    grids: Mapping[str, InputGrid] | None = None,
    calibration: ExampleInputs | None = None,
) -> None:
    """Write a program to an ONNX file, and compare onnxruntime's results with the program's.

    In a network with quantized inputs, the weights of linear layers and convolutions that are integers times a scale
    per output channel are stored as int8. onnxruntime has integer kernels for layers with both. All other tensors are
    float, and so are the weights of a network without quantized inputs: onnxruntime would convert int8 weights to float
    in every run. If writing or the comparison fails, an existing file stays unchanged.

    Args:
        program: The program that `capture` returned, which is not changed.
        path: The file.
        grids: The grids of the layers' inputs, as `input_grids(model)` returns them.
        calibration: Some real samples. A convolution computes with integers only if its output is rounded as well. If
            no quantizer follows it, as before an addition, the samples determine an 8-bit grid for its output and for
            the sum. Without samples it computes in float, more slowly than in the unquantized network.

    Raises:
        ImportError: The extra `deploy` is not installed.
        ValueError: The results differ. With integers, the outputs may differ by a tenth of their root mean square, by
            half of it if a grid has fewer than 8 bits, and by all of it with fewer than 4: close to a rounding
            boundary, the slightest difference moves a value by a whole step, and such errors grow from layer to layer.
    """
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise ImportError(
            f"save_onnx needs {', '.join(missing)}. Install the extra `deploy`: pip install "
            f"'lightning-compress[deploy]'."
        )
    from lightning_compress.deploy import onnx_graph

    with _quiet():
        marked = mark_inputs(program, grids or {})
        converted = torch.onnx.export(marked, dynamo=True, verbose=False, custom_translation_table=translations())
    assert converted is not None
    model = converted.model_proto
    is_quantized = marked is not program
    if is_quantized:
        onnx_graph.quantize_weights(model)
    if calibration is not None and (names := onnx_graph.float_outputs(model)):
        values = _run(onnx_graph.with_outputs(model, names).SerializeToString(), calibration)
        for name, value in zip(names, values, strict=True):
            onnx_graph.round_output(model, name, InputGrid.covering(float(value.min()), float(value.max()), 8))
        log.info("These outputs are rounded to 8 bits, over the range of the samples: %s.", ", ".join(names))
    if is_quantized:
        if names := onnx_graph.float_layers(model):
            log.warning(
                "The inputs of these layers are quantized, but their weights stay float, because they are not integers "
                "times a scale per output channel, or because int8 has no form for such a layer: %s.",
                ", ".join(names),
            )
        onnx_graph.strip(model)
    network = program.module()
    examples: list[Any] = [program.example_inputs] if calibration is None else [arguments(calibration)]
    if calibration is None and not is_quantized and (axes := Axes.of_program(program)).sizes:
        examples.append(axes.others(lambda inputs: network(*inputs[0], **inputs[1])))
    with replacing(path) as temporary:
        if is_quantized:
            temporary.write_bytes(model.SerializeToString())
        else:
            converted.save(temporary)
        for args, kwargs in examples:
            found = [torch.from_numpy(value) for value in _run(temporary, (*args, kwargs))]
            with torch.no_grad():
                expected = network(*args, **kwargs)
            what = "The ONNX file in onnxruntime"
            if is_quantized:
                fewest = min(grid.bits for grid in (grids or {}).values())
                allowed = next(part for bits, part in _ROUNDING.items() if fewest >= bits)
                _compare_rounded(tensors((expected,)), found, what, allowed=allowed)
            else:
                compare(tensors((expected,)), found, what)


def _run(model: Path | bytes, example_inputs: ExampleInputs) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feed = {name: leaf.numpy() for name, leaf in zip(names, tensors(example_inputs), strict=True)}
    found: list[Any] = session.run(None, feed)
    return found


def _compare_rounded(expected: list[Tensor], found: list[Tensor], what: str, *, allowed: float) -> None:
    for ours, theirs in zip(expected, found, strict=True):
        error, size = (float(one.double().square().mean().sqrt()) for one in (ours - theirs, ours))
        log.info("Integers change the outputs by %.2g of their root mean square.", error / size if size else 0.0)
        if not error <= allowed * size:
            raise ValueError(
                f"{what} computes something else than the model: the outputs' root mean square is {size:.3g}, and that "
                f"of the differences {error:.3g}, more than the {allowed * size:.3g} rounding explains. Check that "
                f"the grids are those of the model, and that the calibration samples resemble its training samples."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about optimisations, torchvision's operators and a deprecated torch type."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
