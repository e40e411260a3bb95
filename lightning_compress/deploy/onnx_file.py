"""A network as an ONNX file, checked by onnxruntime: integers where its weights and inputs are quantized."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_compress.core.files import replacing
from lightning_compress.core.folding import fold_batch_norm
from lightning_compress.core.inputs import ExampleInputs, tensors
from lightning_compress.core.select import WEIGHT_LAYERS
from lightning_compress.deploy.int8 import Graph, float_outputs, integer_weight, quantize_weights
from lightning_compress.deploy.marks import mark_inputs, translations
from lightning_compress.deploy.program import compare
from lightning_compress.quantization.input_grids import InputGrid, input_grids

log = logging.getLogger(__name__)

_NOISE = 0.1  # of the outputs' spread: what integer arithmetic may change


def fold_quantized(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """Fold batch norm into quantized layers' networks, in place, so that weights stay integers times a scale.

    A network without quantized weights stays as it is.
    """
    scales = {}
    for name, layer in model.named_modules():
        if isinstance(layer, WEIGHT_LAYERS) and "weight" in layer._parameters:
            transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
            found = integer_weight(layer.weight.detach().numpy(), int(transposed))
            if found is not None:
                scales[name] = torch.from_numpy(found.scales)
    return fold_batch_norm(model, example_inputs, scales=scales) if scales else model


def save_onnx(
    program: ExportedProgram,
    path: str | Path,
    *,
    grids: Mapping[str, InputGrid] | None = None,
    calibration: ExampleInputs | None = None,
) -> None:
    """Write the program as ONNX, and compare what onnxruntime computes with it; the file appears whole or not at all.

    Weights of Linear and convolution that are integers times a scale, one per output channel, are stored as int8. With
    quantized inputs as well the layer is what onnxruntime has integer kernels for.

    Args:
        program: Of `capture`; it stays as it is.
        path: Of the file.
        grids: Of layers' inputs, as in `input_grids(model)`.
        calibration: A batch of real samples. Integer convolutions whose output nothing rounds, as before an addition,
            get an 8-bit grid for it from the values seen: without one onnxruntime would compute them in float.

    Raises:
        ImportError: The extra `deploy` is not installed.
        ValueError: onnxruntime computes something else.
    """
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise ImportError(
            f"ONNX files need {', '.join(missing)}, which the extra `deploy` brings: pip install "
            f"'lightning-compress[deploy]'."
        )
    grids = grids or {}
    marked, found = mark_inputs(program, grids) if grids else (program, set())
    with _quiet():
        converted = torch.onnx.export(marked, dynamo=True, verbose=False, custom_translation_table=translations())
    assert converted is not None
    model = converted.model_proto
    is_int8 = bool(quantize_weights(model)) or bool(found)
    if calibration is not None:
        _round_outputs(model, calibration)
    args, kwargs = program.example_inputs
    expected = tensors((program.module()(*args, **kwargs),))
    with replacing(path) as temporary:
        if is_int8:
            Path(temporary).write_bytes(model.SerializeToString())
        else:
            converted.save(temporary)
        outputs = [torch.from_numpy(value) for value in _run(str(temporary), (args, kwargs))]
        what = "The ONNX file, run by onnxruntime,"
        if is_int8:
            _compare_rounded(expected, outputs, what)
        else:
            compare(expected, outputs, what)


def _run(model: str | bytes, example_inputs: Any) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    leaves = tensors(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,))
    found: list[Any] = session.run(None, {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)})
    return found


def _round_outputs(model: Any, calibration: ExampleInputs) -> None:
    import onnx

    names = float_outputs(model)
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    if names:
        for name, values in zip(names, _run(watched.SerializeToString(), calibration), strict=True):
            Graph(model).round_output(name, InputGrid.covering(float(values.min()), float(values.max()), 8))


def _compare_rounded(expected: list[Tensor], found: list[Tensor], what: str) -> None:
    for ours, theirs in zip(expected, found, strict=True):
        noise = float((ours - theirs).double().square().mean().sqrt() / ours.double().std().clamp(min=1e-12))
        print("noise", noise)
        if noise > _NOISE:
            raise ValueError(
                f"{what} computes something else than the model: outputs differ by {noise:.2g} of their spread, where "
                f"integers may change {_NOISE}."
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
