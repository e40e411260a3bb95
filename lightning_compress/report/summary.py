"""What one run measured: the content of report.json."""

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

FORMAT = 3  # of report.json; from_dict reads format 2 too


@dataclass(frozen=True)
class Measurement:
    """One network: how good it is and what it costs.

    Attributes:
        test_metric: What the test logged as the report's metric; None where nothing was tested.
        parameters: Entries of all parameters.
        nonzero_parameters: Those that are not zero.
        macs: Multiply-accumulates of a forward pass, per sample.
        file_bytes: Size of a file that was written and read back.
        latency_ms: Milliseconds of a forward pass.
        peak_memory_bytes: Memory of parameters, buffers and activations at the worst moment of a forward pass.
        uncounted_operators: Operators that `macs` leaves out.
        latency_spread: Width of the middle half of the timed passes, over their median.
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
        """Return the footprint beside what the test found.

        Args:
            footprint: What `lightning_compress.measure.footprint.measure` measured.
            test_metric: What the test logged as the report's metric.
            latency: Where networks were timed in turns (`time_in_turns`); None: the footprint's own.
            file_bytes: Size of another file than the footprint's; None: the footprint's own.
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
        epoch: Its number.
        val_metric: What the validation logged as the report's `val_metric`; None where it was not validated.
        numbers: What the techniques logged, by name without the folder "compress/": sparsity, weight_bits and the like.
        phase: "dense", "compression", "recovery", or another name that the run gives to its phases.
    """

    epoch: int
    val_metric: float | None
    numbers: Mapping[str, float]
    phase: str


@dataclass(frozen=True)
class Layer:
    """One weight tensor before and after.

    Attributes:
        name: Qualified name of the module that owns it, or of the tensor where it is no `weight`.
        parameters: Entries in the dense network.
        nonzero_dense: Those that are not zero there.
        nonzero_compressed: Those that are not zero in the compressed network; 0 where it has no such tensor.
    """

    name: str
    parameters: int
    nonzero_dense: int
    nonzero_compressed: int


def compare_layers(dense: Mapping[str, Tensor], compressed: Mapping[str, Tensor]) -> tuple[Layer, ...]:
    """Return what is left of every parameter with two or more dimensions, in the order of the dense network.

    A compressed network that has other parameters, or larger ones, is not what is left of the dense one: nothing is
    returned then.

    Args:
        dense: Named parameters of the dense network.
        compressed: Those of the compressed one, which may be smaller or absent.

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
    """A run: the dense network beside the compressed one, and how it went.

    Attributes:
        dense: The network before compression.
        compressed: The network at the end.
        before_recovery: The test's metric of the network when the last technique with a ramp, such as pruning, had
            come to its end, before any further training; None where it was not measured.
        history: One entry per epoch, dense training first.
        layers: One entry per weight tensor; none where the compressed network has other layers than the dense one.
        settings: What the run was started with (seed, amount, ...); values that JSON can write, nested as they are.
        metric: Name under which the module's test logs what is compared; None where nothing was tested.
        val_metric: Name of what its validation logs.
        metric_mode: "max" or "min", the direction in which both get better, where their names do not say so.
        busy: Whether the machine was too busy for the two latencies to be compared.
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

    @property
    def tested(self) -> Metric:
        """How the numbers of the test are shown."""
        values = (self.dense.test_metric, self.before_recovery, self.compressed.test_metric)
        return Metric.of(self.metric or "not tested", values, mode=self.metric_mode)

    @property
    def validated(self) -> Metric:
        """How the numbers of the validation are shown."""
        return Metric.of(self.val_metric, (epoch.val_metric for epoch in self.history), mode=self.metric_mode)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json, as plain dicts, lists, numbers and strings."""
        return {"format": FORMAT} | asdict(self) | {"before_recovery": {"test_metric": self.before_recovery}}

    @classmethod
    def from_dict(cls, content: Any) -> Report:
        """Return the report that `to_dict` wrote.

        Raises:
            ValueError: Something is missing or has the wrong type; the message says what and where.
        """
        content = _expect(content, dict, "the top level")
        if (found := content.get("format", 1)) not in (2, FORMAT):
            raise ValueError(f"its format is {found!r}, and this version reads 2 and {FORMAT}: write it anew.")
        if found == 2:
            content = content | {"history": _renamed_epochs(_get(content, "history", "the top level"))}
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
        )

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Return the report in a report.json.

        Raises:
            ValueError: The file is no complete report; the message names it and what is wrong.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # a JSONDecodeError and a UnicodeDecodeError are ValueErrors, too
            raise ValueError(f"{path} is no complete report: {error}") from error


_TEXT_FIELDS = {"phase", "name"}


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
