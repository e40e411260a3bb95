"""The report of one run, and its form in report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_compress.measure.footprint import Footprint, Latency
from lightning_compress.report.metric import Metric, Mode

T = TypeVar("T")

FORMAT = 6  # of report.json; from_dict reads formats 2 to 5 too
_LATER_OF_POINTS = {"file_bytes": None, "nonzero_parameters": None, "epochs": None}  # what these formats may lack


@dataclass(frozen=True)
class Measurement:
    """The test's metric of one network, and its costs.

    Attributes:
        test_metric: Value that the test logged as the report's metric; None where nothing was tested.
        parameters: Number of entries of all parameters.
        nonzero_parameters: Number of entries that are not zero.
        macs: Multiply-accumulate operations of a forward pass, per sample.
        file_bytes: Size in bytes of a file that was written and read back.
        latency_ms: Median time of a forward pass in milliseconds.
        peak_memory_bytes: Largest memory of parameters, buffers and activations during a forward pass, in bytes.
        uncounted_operators: Operators that are not counted in `macs`.
        latency_spread: Interquartile range of the timed passes, divided by their median.
    """

    test_metric: float | None
    parameters: int
    nonzero_parameters: int
    macs: int
    file_bytes: int
    latency_ms: float
    peak_memory_bytes: int | None = None
    uncounted_operators: tuple[str, ...] = ()
    latency_spread: float = 0.0

    @classmethod
    def from_footprint(
        cls,
        footprint: Footprint,
        *,
        test_metric: float | None,
        latency: Latency | None = None,
        file_bytes: int | None = None,
    ) -> Measurement:
        """Combine a footprint with the result of the test.

        Args:
            footprint: Result of `lightning_compress.measure.footprint.measure`.
            test_metric: Value that the test logged as the report's metric.
            latency: Latency of networks that were timed in turns (`time_in_turns`); None takes that of the footprint.
            file_bytes: Size of another file in bytes; None takes that of the footprint.
        """
        return cls(
            test_metric=test_metric,
            parameters=footprint.parameters,
            nonzero_parameters=footprint.nonzero,
            macs=footprint.macs,
            file_bytes=footprint.bytes if file_bytes is None else file_bytes,
            latency_ms=1000.0 * (footprint.latency if latency is None else latency.seconds),
            peak_memory_bytes=footprint.peak_memory,
            uncounted_operators=footprint.uncounted,
            latency_spread=0.0 if latency is None else latency.spread,
        )


@dataclass(frozen=True)
class Epoch:
    """The state after one epoch.

    Attributes:
        epoch: Number of the epoch in its fit, from 0.
        val_metric: Value that the validation logged as the report's `val_metric`; None where nothing was validated.
        numbers: The techniques' numbers under the names by which they are logged, without the folder "compress/", such
            as sparsity or weight_bits.
        phase: "dense", "compression", "recovery", or another name that the run gives to its phases.
    """

    epoch: int
    val_metric: float | None
    numbers: Mapping[str, float]
    phase: str


@dataclass(frozen=True)
class Layer:
    """One weight tensor before and after compression.

    Attributes:
        name: Qualified name of the tensor, without ".weight" at its end.
        parameters: Number of entries in the dense network.
        nonzero_dense: Number of non-zero entries in the dense network.
        nonzero_compressed: Number of non-zero entries in the compressed network; 0 where the tensor was removed.
    """

    name: str
    parameters: int
    nonzero_dense: int
    nonzero_compressed: int


@dataclass(frozen=True)
class Point:
    """One way to run a network, or one network: its quality and what a forward pass costs.

    Attributes:
        name: Such as "exit 1" or "40% of macs".
        kind: "dense" for the network before compression, "point" for a way to run the compressed one, "control" for a
            network that was trained alone, as a comparison, "variant" for one that was compressed in another way.
        test_metric: As in `Measurement`.
        macs: Mean multiply-accumulates per sample of the timed batch.
        latency_ms: Milliseconds of a forward pass of that batch.
        file_bytes: Size of the network's compressed file; None for a way to run the compressed network, which has one.
        nonzero_parameters: As in `Measurement`; None for a way to run the compressed network.
        epochs: Epochs of the network's own fit; None where it is not known.
    """

    name: str
    kind: str
    test_metric: float | None
    macs: float
    latency_ms: float
    file_bytes: float | None = None
    nonzero_parameters: float | None = None
    epochs: float | None = None


def compare_layers(dense: Mapping[str, Tensor], compressed: Mapping[str, Tensor]) -> tuple[Layer, ...]:
    """Count the non-zero entries of every parameter with two or more dimensions, in the order of the dense network.

    The result is empty where the compressed network has other or larger parameters, so that it is no part of the dense
    network.

    Args:
        dense: Named parameters of the dense network.
        compressed: Named parameters of the compressed network, which may be smaller or absent.

    Example:
        >>> from torch import nn
        >>> dense, compressed = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 2))
        >>> _ = compressed[0].weight.data[0].zero_()
        >>> compare_layers(dict(dense.named_parameters()), dict(compressed.named_parameters()))
        (Layer(name='0', parameters=8, nonzero_dense=8, nonzero_compressed=4),)
    """
    if not all(_fits(tensor, dense.get(name)) for name, tensor in compressed.items() if tensor.dim() > 1):
        return ()
    return tuple(
        Layer(
            name=name.removesuffix(".weight"),
            parameters=tensor.numel(),
            nonzero_dense=int(torch.count_nonzero(tensor)),
            nonzero_compressed=int(torch.count_nonzero(compressed[name])) if name in compressed else 0,
        )
        for name, tensor in dense.items()
        if tensor.dim() > 1 and tensor.numel() > 0
    )


def _fits(tensor: Tensor, dense: Tensor | None) -> bool:
    return (
        dense is not None
        and tensor.dim() == dense.dim()
        and all(size <= whole for size, whole in zip(tensor.shape, dense.shape, strict=True))
    )


@dataclass(frozen=True)
class Report:
    """The report of one run: dense and compressed network, the epochs, and the settings.

    Attributes:
        dense: Measurement of the network before compression.
        compressed: Measurement of the network at the end.
        before_recovery: The test's metric of the network when the last technique with a ramp, such as pruning, had
            come to its end, before any further training; None where it was not measured.
        history: One entry per epoch, dense training first.
        layers: One entry per weight tensor; none where the compressed network has other layers than the dense one.
        settings: Nested settings of the run (seed, amount, ...), with values that JSON can express.
        metric: Name under which the test logs the metric of the comparison; None where nothing was tested.
        val_metric: Name under which the validation logs the metric of the epochs.
        metric_mode: "max" or "min", the direction in which both metrics get better, where their names do not say so.
        busy: Whether other processes kept the machine so busy that the latencies can't be compared.
        points: The ways in which the compressed network can be run, beside the dense network and the controls; none
            where it can be run in one way only and there is no control.
        command: The command line that repeats the run; None where it was started from Python.
        called: Name of the compressed network in the table of the ways to compress.
    """

    dense: Measurement
    compressed: Measurement
    before_recovery: float | None = None
    history: tuple[Epoch, ...] = ()
    layers: tuple[Layer, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    metric: str | None = "test_acc"
    val_metric: str = "val_acc"
    metric_mode: Mode | None = None
    busy: bool = False
    points: tuple[Point, ...] = ()
    command: str | None = None
    called: str = "compressed"

    @property
    def tested(self) -> Metric:
        """The metric of the test."""
        values = (self.dense.test_metric, self.before_recovery, self.compressed.test_metric)
        return Metric.of(self.metric or "not tested", values, mode=self.metric_mode)

    @property
    def validated(self) -> Metric:
        """The metric of the validation."""
        return Metric.of(self.val_metric, (epoch.val_metric for epoch in self.history), mode=self.metric_mode)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json as plain dicts, lists, numbers and strings."""
        return {"format": FORMAT} | asdict(self) | {"before_recovery": {"test_metric": self.before_recovery}}

    @classmethod
    def from_dict(cls, content: Any) -> Report:
        """Return the report that `to_dict` wrote.

        Raises:
            ValueError: A value is missing or has the wrong type; the message names it.
        """
        content = _expect(content, dict, "the top level")
        if (found := content.get("format", 1)) not in range(2, FORMAT + 1):
            raise ValueError(f"its format is {found!r}, and this version reads 2 to {FORMAT}: write it anew.")
        if found == 2:
            history = _renamed_epochs(_get(content, "history", "the top level"))
            content = content | {"history": history, "points": []}
        if found < 5:
            content = content | {"command": None}
        if found < 6:
            content = content | {"called": "compressed"}
        if found in (3, 4, 5):
            points = _expect(_get(content, "points", "the top level"), list, "points")
            known = [_expect(one, dict, f"points[{i}]") for i, one in enumerate(points)]
            content = content | {"points": [_LATER_OF_POINTS | one for one in known]}
        before = _expect(_get(content, "before_recovery", "the top level"), dict, "before_recovery")
        return cls(
            dense=_build(Measurement, _get(content, "dense", "the top level"), "dense"),
            compressed=_build(Measurement, _get(content, "compressed", "the top level"), "compressed"),
            before_recovery=_number(_get(before, "test_metric", "before_recovery"), "before_recovery.test_metric"),
            history=_build_all(Epoch, content, "history"),
            layers=_build_all(Layer, content, "layers"),
            settings=_expect(_get(content, "settings", "the top level"), dict, "settings"),
            metric=_text(content, "metric"),
            val_metric=_expect(_get(content, "val_metric", "the top level"), str, "val_metric"),
            metric_mode=_mode(_text(content, "metric_mode")),
            busy=_expect(_get(content, "busy", "the top level"), bool, "busy"),
            points=_build_all(Point, content, "points"),
            command=_text(content, "command"),
            called=_expect(_get(content, "called", "the top level"), str, "called"),
        )

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Return the report in a report.json.

        Raises:
            ValueError: The report is incomplete; the message names the file and the fault.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # a JSONDecodeError and a UnicodeDecodeError are ValueErrors, too
            raise ValueError(f"{path} is no complete report: {error}") from error


_TEXT_FIELDS = {"phase", "name", "kind"}


def _renamed_epochs(history: Any) -> list[Any]:
    """Return the epochs of a report of format 2, in which pruning was the only technique with a number."""
    epochs = []
    for i, epoch in enumerate(_expect(history, list, "history")):
        values = dict(_expect(epoch, dict, f"history[{i}]"))
        sparsity = _get(values, "sparsity", f"history[{i}]")
        phase = "compression" if values.get("phase") == "pruning" else values.get("phase")
        epochs.append(values | {"numbers": {"sparsity": sparsity}, "phase": phase})
    return epochs


def _build(cls: type[T], content: Any, where: str) -> T:
    content = _expect(content, dict, where)
    values: dict[str, Any] = {}
    for item in fields(cls):  # type: ignore[arg-type]
        value = _get(content, item.name, where)
        place = f"{where}.{item.name}"
        if item.name == "uncounted_operators":
            values[item.name] = tuple(_expect(value, list, place))
        elif item.name == "numbers":
            named = _expect(value, dict, place)
            values[item.name] = {name: _number(one, f"{place}.{name}", null=False) for name, one in named.items()}
        elif item.name in _TEXT_FIELDS:
            values[item.name] = _expect(value, str, place)
        else:
            values[item.name] = _number(value, place)
    return cls(**values)


def _build_all(cls: type[T], content: dict[str, Any], key: str) -> tuple[T, ...]:
    entries = _expect(_get(content, key, "the top level"), list, key)
    return tuple(_build(cls, entry, f"{key}[{i}]") for i, entry in enumerate(entries))


def _get(content: dict[str, Any], key: str, where: str) -> Any:
    if key not in content:
        raise ValueError(f"{key!r} is missing in {where}.")
    return content[key]


def _expect(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{where} should be a {kind.__name__}, and is {value!r:.80}.")
    return value


def _text(content: dict[str, Any], key: str) -> str | None:
    value = _get(content, key, "the top level")
    return None if value is None else _expect(value, str, key)


def _mode(value: str | None) -> Mode | None:
    if value not in (None, "max", "min"):
        raise ValueError(f"metric_mode should be 'max', 'min' or null, and is {value!r:.80}.")
    return value  # type: ignore[return-value]  # one of the three


def _number(value: Any, where: str, *, null: bool = True) -> Any:
    if not (null and value is None) and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"{where} should be a number{' or null' if null else ''}, and is {value!r:.80}.")
    return value
