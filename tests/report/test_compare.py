from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lightning_compress.report import (
    Comparison,
    Epoch,
    Measurement,
    Report,
    Run,
    gather,
    runs_figure,
    runs_table,
    write_comparison,
    write_report,
)
from lightning_compress.report.compare import comparison_cells, runs_csv, runs_markdown, varying_settings

DENSE = Measurement(0.98, 1000, 1000, 500, 4000, 1.0, 64000)


def report(amount: float, seed: int = 0, **changes: float) -> Report:
    compressed = replace(DENSE, nonzero_parameters=round(1000 * (1 - amount)), **changes)
    return Report(DENSE, compressed, before_recovery=0.5, settings={"seed": seed, "compress": {"amount": amount}})


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_report(report(0.5, test_metric=0.97, file_bytes=2500), tmp_path / "2", figure=False)
    write_report(report(0.9, test_metric=0.95, file_bytes=500, latency_ms=0.5), tmp_path / "10", figure=False)
    return tmp_path


def test_runs_come_in_the_order_of_their_numbers(sweep: Path) -> None:
    assert [run.name for run in gather(sweep).runs] == ["2", "10"]


def test_broken_reports_are_named_and_the_others_compared(sweep: Path) -> None:
    for name, text in [("3", "{"), ("4", '{"dense": {}}')]:
        (sweep / name).mkdir()
        (sweep / name / "report.json").write_text(text)
    comparison = gather(sweep)
    assert len(comparison.runs) == 2
    assert [reason.split(" is ")[0] for reason in comparison.unreadable] == [
        str(sweep / "3" / "report.json"),
        str(sweep / "4" / "report.json"),
    ]
    output = io.StringIO()
    Console(file=output, width=300).print(runs_table(comparison))
    for text in (output.getvalue(), runs_markdown(comparison)):
        assert all("".join(reason.split()) in "".join(text.split()) for reason in comparison.unreadable)


def test_a_name_in_brackets_is_shown_as_it_is(sweep: Path) -> None:
    output = io.StringIO()
    run = gather(sweep).runs[0]
    Console(file=output, width=300).print(runs_table(Comparison((replace(run, name="compress=[a,b]"),))))
    assert "compress=[a,b]" in output.getvalue()


def test_runs_before_and_after_a_key_was_renamed_share_a_column(tmp_path: Path) -> None:
    for key, amount in (("pruning", 0.5), ("iterative_pruning", 0.9)):
        one = replace(report(amount), settings={"callbacks": {key: {"amount": amount}}})
        write_report(one, tmp_path / key, figure=False)
    assert varying_settings(gather(tmp_path).runs) == ["callbacks.iterative_pruning.amount"]


def test_only_settings_that_differ_become_columns(sweep: Path) -> None:
    runs = gather(sweep).runs
    assert varying_settings(runs) == ["compress.amount"]
    assert comparison_cells(runs)[0][:3] == ["#", "run", "amount"]
    other = Run("x", replace(runs[0].report, settings={"seed": 0, "model": {"amount": 1}}))
    assert comparison_cells([*runs, other])[0][:4] == ["#", "run", "compress.amount", "model.amount"]


def test_a_narrow_table_has_whole_numbers_and_leaves_the_rest_to_the_file(sweep: Path) -> None:
    output = io.StringIO()
    Console(file=output, width=80).print(runs_table(gather(sweep), width=80))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for whole in ("test_acc", "change", "smaller", "faster", "95.00 %", "-3.00", "8.0x", "2.00x"):
        assert whole in output.getvalue()
    assert "bytes" not in output.getvalue()
    assert "bytes" in runs_markdown(gather(sweep))


def test_runs_of_different_metrics_say_which_each_has(sweep: Path) -> None:
    runs = gather(sweep).runs
    other = Run("loss", replace(runs[0].report, metric="test_loss"))
    header, rows = comparison_cells([runs[0], other])
    assert header[header.index("change") - 1] == "metric"
    assert [row[header.index("metric")] for row in rows] == ["test_acc 97.00 %", "test_loss 0.97"]
    left, _ = runs_figure(Comparison((runs[0], other))).axes
    assert len(left.collections[1].get_offsets()) == 1


def test_rows_compare_with_the_runs_own_dense_network(sweep: Path) -> None:
    _, rows = comparison_cells(gather(sweep).runs)
    assert rows[1] == ["2", "10", "0.9", "95.00 %", "-3.00", "100", "500", "8.0x", "0.500", "2.00x"]


def test_the_csv_has_plain_numbers(sweep: Path) -> None:
    first, second = csv.DictReader(io.StringIO(runs_csv(gather(sweep))))
    assert first["compress.amount"] == "0.5"
    assert float(second["compressed.test_metric"]) == 0.95
    assert int(second["dense.file_bytes"]) == 4000
    assert float(second["before_recovery"]) == 0.5


def test_the_csv_has_the_numbers_of_every_runs_last_epoch(sweep: Path) -> None:
    one, other = gather(sweep).runs
    epochs = (Epoch(0, 0.9, {"sparsity": 0.1}, "compression"), Epoch(1, 0.9, {"sparsity": 0.5}, "recovery"))
    named = Comparison((replace(one, report=replace(one.report, history=epochs)), other))
    assert [row["last_epoch.sparsity"] for row in csv.DictReader(io.StringIO(runs_csv(named)))] == ["0.5", ""]


def test_the_figure_has_each_run_at_its_bytes_and_latency(sweep: Path) -> None:
    left, right = runs_figure(gather(sweep)).axes
    dense, compressed = left.collections
    assert dense.get_offsets().tolist() == [[4000, 98]], "the same dense network is one point"
    assert compressed.get_offsets().tolist() == [[2500, 97], [500, 95]]
    assert right.collections[1].get_offsets().tolist() == [[1.0, 97], [0.5, 95]]
    assert right.get_xlim()[0] == 0
    assert [text.get_text() for text in left.texts] == ["1", "2"]


def test_runs_that_were_not_tested_have_a_figure_that_says_so(tmp_path: Path) -> None:
    untested = report(0.5, test_metric=None)  # type: ignore[arg-type]
    runs = (Run("a", replace(untested, dense=replace(DENSE, test_metric=None), metric=None)),)
    paths = write_comparison(Comparison(runs), tmp_path)
    assert [path.name for path in paths] == ["comparison.md", "comparison.csv", "comparison.png"]
    assert [text.get_text() for text in runs_figure(Comparison(runs)).axes[0].texts] == ["no run was tested"]


def test_a_run_without_test_metric_is_in_the_table_and_not_in_the_figure() -> None:
    runs = (Run("a", report(0.5, test_metric=0.97)), Run("b", report(0.9, test_metric=None)))  # type: ignore[arg-type]
    assert comparison_cells(runs)[1][1][3:6] == ["-", "-", "100"]
    left, _ = runs_figure(Comparison(runs)).axes
    assert [text.get_text() for text in left.texts] == ["1"]


def test_files_are_written_beside_the_runs(sweep: Path) -> None:
    paths = write_comparison(gather(sweep), sweep)
    assert [path.name for path in paths] == ["comparison.md", "comparison.csv", "comparison.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_nothing_to_compare_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder"):
        gather(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"no complete report.json below {tmp_path}: no run has written one"):
        gather(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"no complete report.json below .*report.json is no complete report"):
        gather(tmp_path)
