from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.measure.footprint import Footprint, Latency
from lightning_compress.report import Epoch, Layer, Measurement, Point, Report, compare_layers

DENSE = Measurement(0.98, 1000, 990, 5000, 4100, 1.5, 64000, ())
COMPRESSED = Measurement(0.97, 1000, 100, 5000, 600, 1.25, 64000, ("aten::foo",))
REPORT = Report(
    dense=DENSE,
    compressed=COMPRESSED,
    before_recovery=0.6,
    history=(Epoch(0, 0.9, {}, "dense"), Epoch(1, None, {"sparsity": 0.9, "weight_bits": 4.0}, "compression")),
    layers=(Layer("conv", 100, 100, 7),),
    settings={"seed": 0, "callbacks": {"pruning": {"amount": 0.9}}},
)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT.to_dict()))
    assert Report.load(path) == REPORT


def test_the_keys_are_those_that_readers_rely_on() -> None:
    content = REPORT.to_dict()
    for network in ("dense", "compressed"):
        keys = {"test_metric", "parameters", "nonzero_parameters", "macs", "file_bytes", "latency_ms"}
        assert keys <= set(content[network])
    assert content["before_recovery"] == {"test_metric": 0.6}
    assert set(content["history"][0]) == {"epoch", "val_metric", "numbers", "phase"}


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything that a complete report has, but the content of settings and numbers."""
    found = [path] if path else []
    if path and path[-1] in ("settings", "numbers"):
        return found
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        found += leaves(value, (*path, key))
    return found


FIELDS = [path for path in leaves(REPORT.to_dict()) if isinstance(path[-1], str)]


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_whatever_is_missing_or_mistyped_is_named_with_the_file(tmp_path: Path, path: tuple[Any, ...]) -> None:
    file = tmp_path / "report.json"
    for damage in ("remove", "mistype"):
        content = json.loads(json.dumps(REPORT.to_dict()))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        if damage == "remove":
            del parent[path[-1]]
        else:
            parent[path[-1]] = ["another type"] if path == ("settings",) else {"of": "another type"}
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"report\.json is no complete report: ") as caught:
            Report.load(file)
        assert path[-1] in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_what_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"report\.json is no complete report"):
        Report.load(file)


def test_a_footprint_becomes_a_measurement_in_its_units() -> None:
    footprint = Footprint(10, 4, 50, 120, 0.002, 999, ("aten::foo",))
    measured = Measurement.from_footprint(footprint, test_metric=0.5)
    assert measured == Measurement(0.5, 10, 4, 50, 120, pytest.approx(2.0), 999, ("aten::foo",))
    timed = Measurement.from_footprint(footprint, test_metric=None, latency=Latency(0.001, 0.2, False), file_bytes=77)
    assert (timed.latency_ms, timed.latency_spread, timed.file_bytes) == (pytest.approx(1.0), 0.2, 77)


def test_a_report_of_another_format_is_named_and_not_read(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({key: value for key, value in REPORT.to_dict().items() if key != "format"}))
    with pytest.raises(ValueError, match=r"report\.json .*its format is 1, and this version reads 2 to 6"):
        Report.load(file)


def test_a_report_of_format_3_has_points_without_files(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    point = {"name": "exit 1", "kind": "point", "test_metric": 0.5, "macs": 10.0, "latency_ms": 1.0}
    file.write_text(json.dumps(REPORT.to_dict() | {"format": 3, "points": [point]}))
    assert Report.load(file).points == (Point("exit 1", "point", 0.5, 10.0, 1.0, None),)


def test_a_report_of_format_2_is_read_under_the_names_of_today(tmp_path: Path) -> None:
    """The text is what an earlier version wrote, but for the settings."""
    epochs = [
        {"epoch": 0, "val_metric": 0.9, "sparsity": 0.0, "phase": "dense"},
        {"epoch": 0, "val_metric": 0.8, "sparsity": 0.5, "phase": "pruning"},
        {"epoch": 1, "val_metric": None, "sparsity": 0.9, "phase": "recovery"},
    ]
    file = tmp_path / "report.json"
    file.write_text(json.dumps(REPORT.to_dict() | {"format": 2, "history": epochs}))
    assert Report.load(file).history == (
        Epoch(0, 0.9, {"sparsity": 0.0}, "dense"),
        Epoch(0, 0.8, {"sparsity": 0.5}, "compression"),
        Epoch(1, None, {"sparsity": 0.9}, "recovery"),
    )
    del epochs[1]["sparsity"]
    file.write_text(json.dumps(REPORT.to_dict() | {"format": 2, "history": epochs}))
    with pytest.raises(ValueError, match=r"'sparsity' is missing in history\[1\]"):
        Report.load(file)


def test_a_number_that_is_none_is_named() -> None:
    content = json.loads(json.dumps(REPORT.to_dict()))
    content["history"][1]["numbers"]["weight_bits"] = "four"
    with pytest.raises(ValueError, match=r"history\[1\]\.numbers\.weight_bits should be a number, and is 'four'"):
        Report.from_dict(content)


def test_layers_are_counted_by_name_whatever_their_new_shape() -> None:
    dense = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    smaller = copy.deepcopy(dense)
    smaller[0] = nn.Conv2d(1, 2, 3)
    with torch.no_grad():
        dense[3].weight[0, 0] = 0
        smaller[3].weight[:2] = 0
    del smaller[4]
    assert compare_layers(dict(dense.named_parameters()), dict(smaller.named_parameters())) == (
        Layer("0", 36, 36, 18),
        Layer("3", 12, 11, 4),
        Layer("4", 6, 6, 0),
    )


def test_a_network_that_is_no_part_of_the_dense_one_is_not_compared_layer_by_layer() -> None:
    def layers(*modules: nn.Module) -> tuple[Layer, ...]:
        return compare_layers(dict(dense.named_parameters()), dict(nn.Sequential(*modules).named_parameters()))

    dense = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert layers(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2)) == (Layer("0", 12, 12, 4), Layer("2", 6, 6, 2))
    assert layers(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) == ()  # wider
    assert layers(nn.Linear(4, 2), nn.Linear(2, 2)) == ()  # another name
    assert layers(nn.Conv1d(1, 1, 1), nn.ReLU(), nn.Linear(3, 2)) == ()  # another kind


def test_a_parameter_that_is_no_weight_keeps_its_name() -> None:
    attention = nn.MultiheadAttention(4, 2)
    names = [layer.name for layer in compare_layers(dict(attention.named_parameters()), {})]
    assert names == ["in_proj_weight", "out_proj"]
