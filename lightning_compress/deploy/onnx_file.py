"""A network as an ONNX file, checked by onnxruntime: with integers where its weights and inputs are quantized."""

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

_ROUNDING = {8: 0.1, 4: 0.5, 2: 1.0}  # bits, at least: what integers may change, of the outputs' root mean square


def save_onnx(
    program: ExportedProgram,
    path: str | Path,
    *,
    grids: Mapping[str, InputGrid] | None = None,
    calibration: ExampleInputs | None = None,
) -> None:
    """Write the program as ONNX, and compare what onnxruntime computes with it; the file appears whole or not at all.

    In a network with quantized inputs, weights of linear layers and convolutions that are integers times a scale, one
    for every output channel, are stored as int8, and onnxruntime has integer kernels for the layers with both. All else
    is float, and so is a network of quantized weights alone: it would multiply the scales out in every run.

    Args:
        program: Of `capture`; it stays as it is.
        path: Of the file.
        grids: Of layers' inputs, as `input_grids(model)` has them.
        calibration: Some real samples. Where a convolution could compute with integers but for its output, as before an
            addition, they tell the range of an 8-bit grid for it, and for the sum; without them it computes in float,
            and more slowly than unquantized.

    Raises:
        ImportError: The extra `deploy` is not installed.
        ValueError: onnxruntime computes something else. With integers, outputs may change by a tenth of their root
            mean square, by half of it where grids have fewer than 8 bits, by all of it with fewer than 4: near a
            boundary, the least difference in arithmetic moves a value by a whole step, and from layer to layer there
            are more of these.
    """
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise ImportError(
            f"ONNX files need {', '.join(missing)}, which the extra `deploy` brings: pip install "
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
        log.info("Rounded to 8 bits, on the range of the samples: %s.", ", ".join(names))
    if is_quantized:
        if names := onnx_graph.float_layers(model):
            log.warning("Inputs are quantized but weights stay float: %s.", ", ".join(names))
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
            what = "The ONNX file, run by onnxruntime,"
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
                f"{what} computes something else than the model: the root mean square of outputs is {size:.3g}, and of "
                f"their differences {error:.3g}, where integers explain {allowed:g} of it. Are the grids those of the "
                f"model, and the calibration samples like those that it was trained on?"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    # They tell of every optimisation, of torchvision's operators, and of a type that torch is going to rename.
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
