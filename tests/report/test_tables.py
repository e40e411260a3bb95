from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from lightning_compress.report import Epoch, Layer, Measurement, Report, comparison_table, report_markdown
from lightning_compress.report.metric import Metric
from lightning_compress.report.tables import comparison_rows, factor, flatten, markdown_table, notes, percent

DENSE = Measurement(0.98611, 38722, 38722, 846_000, 155_688, 0.4, 1_234_567)
REPORT = Report(
    dense=DENSE,
    compressed=replace(DENSE, test_metric=0.98333, nonzero_parameters=3226, file_bytes=19_461, latency_ms=0.39),
    before_recovery=0.75,
    layers=(Layer("conv1", 216, 216, 54),),
    settings={"seed": 3, "compress": {"amount": 0.9}},
)


def cells(report: Report) -> dict[str, tuple[str, ...]]:
    return {label: tuple(rest) for label, *rest in comparison_rows(report)}


def test_each_quantity_stands_in_its_row() -> None:
    rows = cells(REPORT)
    assert rows["test_acc"] == ("98.61 %", "75.00 %", "98.33 %", "-0.28 points (worse)")
    assert rows["parameters"] == ("38,722", "", "38,722", "the same")
    assert rows["non-zero parameters"] == ("38,722", "", "3,226", "12.0x fewer")
    assert rows["file (bytes)"] == ("155,688", "", "19,461", "8.0x smaller")
    assert rows["latency (ms)"] == ("0.400", "", "0.390", "about the same")


def test_the_numbers_of_the_techniques_have_rows_of_their_own() -> None:
    history = (Epoch(0, 0.9, {"weight_bits": 8.0}, "recovery"), Epoch(1, 0.9, {"weight_bits": 4.125}, "recovery"))
    rows = cells(replace(REPORT, history=history))
    assert rows["weight_bits (last epoch)"] == ("", "", "4.125", "")
    assert rows.keys() - cells(REPORT).keys() == {"weight_bits (last epoch)"}


def test_what_was_not_measured_is_a_dash_or_left_out() -> None:
    rows = cells(
        Report(
            dense=replace(DENSE, test_metric=None, peak_memory_bytes=None),
            compressed=replace(DENSE, test_metric=None),
        )
    )
    assert rows["test_acc"] == ("-", "-", "-", "-")
    assert "peak memory (bytes)" not in rows


def test_a_metric_has_its_own_name_unit_and_direction() -> None:
    """A loss of 1.4344 that falls by 0.0458 is neither an accuracy of 143.44 % nor 4.58 points worse."""
    losses = {"metric": "test_loss", "before_recovery": 1.5}
    dense, compressed = replace(DENSE, test_metric=1.4344), replace(DENSE, test_metric=1.3886)
    assert cells(Report(dense, compressed, **losses))["test_loss"] == ("1.434", "1.5", "1.389", "-0.0458 (better)")
    named = Report(dense, compressed, metric="energy", metric_mode="max")
    assert cells(named)["energy"][-1] == "-0.0458 (worse)"
    assert cells(replace(named, metric_mode=None))["energy"][-1] == "-0.0458"
    in_percent = Report(replace(DENSE, test_metric=99.0), replace(DENSE, test_metric=98.5))
    assert cells(in_percent)["test_acc"] == ("99", "-", "98.5", "-0.5 (worse)")


def test_a_busy_machine_is_said_instead_of_a_ratio() -> None:
    busy = replace(REPORT, busy=True, dense=replace(DENSE, latency_spread=0.8))
    assert cells(busy)["latency (ms)"] == ("0.400", "", "0.390", "the machine was busy")
    assert "spans 80% of their median" in " ".join(notes(busy))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (100, 100, "the same"),
        (0, 0, "the same"),
        (100, 99, "1.01x smaller"),
        (100, 50, "2.0x smaller"),
        (50, 100, "2.0x larger"),
        (100, 0, "nothing left"),
    ],
)
def test_ratios_in_words(before: int, after: int, words: str) -> None:
    assert factor(before, after, better="smaller", worse="larger") == words


def test_noise_hides_only_what_is_within_it() -> None:
    words = [factor(1.0, after, better="faster", worse="slower", noise=0.05) for after in (0.94, 0.96, 1.04, 1.06)]
    assert words == ["1.06x faster", "about the same", "about the same", "1.06x slower"]


def test_a_note_says_why_zeros_do_not_save_time_and_only_then() -> None:
    assert any("dense kernels" in note for note in notes(REPORT))
    assert notes(Report(dense=DENSE, compressed=replace(DENSE, nonzero_parameters=10, macs=10))) == []
    assert notes(Report(dense=DENSE, compressed=DENSE)) == []


def test_uncounted_operators_are_named() -> None:
    report = Report(dense=DENSE, compressed=replace(DENSE, uncounted_operators=("aten::foo", "aten::bar")))
    assert "aten::bar, aten::foo" in notes(report)[0]


def test_the_rich_table_shows_every_cell_in_a_terminal_of_100_columns() -> None:
    output = io.StringIO()
    Console(file=output, width=100).print(comparison_table(REPORT))
    text = output.getvalue()
    for row in comparison_rows(REPORT):
        line = next(line for line in text.splitlines() if f" {row[0]} " in line)
        assert all(cell in line for cell in row)
    assert all(" ".join(note.split()) in " ".join(text.split()) for note in notes(REPORT))


def test_the_markdown_has_table_layers_and_settings() -> None:
    text = report_markdown(REPORT)
    assert "| non-zero parameters | 38,722 |  | 3,226 | 12.0x fewer |" in text
    assert "| `conv1` | 216 | 216 | 54 | 25.00 % |" in text
    assert "| `compress.amount` | `0.9` |" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.strip().splitlines()}) == 1


def test_the_markdown_says_why_there_are_no_layers() -> None:
    assert "The compressed network has layers of its own" in report_markdown(replace(REPORT, layers=()))


def test_a_pipe_in_a_cell_does_not_end_it() -> None:
    assert markdown_table(("a",), [("x|y",)])[-1] == "| x\\|y |"


def test_small_helpers() -> None:
    assert percent(1.0) == "100.00 %"
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1]}) == {"a.b": 1, "a.c.d": None, "e": [1]}


@pytest.mark.parametrize(("before", "after"), [(0.2, math.nan), (math.nan, 0.2), (math.inf, math.inf)])
@pytest.mark.parametrize("name", ["test_loss", "test_acc"])
def test_what_is_no_number_is_neither_better_nor_worse(name: str, before: float, after: float) -> None:
    assert "er)" not in Metric.of(name, [before, after]).change(before, after)
