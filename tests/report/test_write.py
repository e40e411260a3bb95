from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_compress.report import Measurement, Report, write_report

DENSE = Measurement(0.98, 100, 100, 100, 400, 1.0)
REPORT = Report(DENSE, replace(DENSE, nonzero_parameters=10))


def test_three_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    paths = write_report(REPORT, folder)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.png"]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert json.loads(paths[0].read_text())["compressed"]["nonzero_parameters"] == 10
    assert "10.0x fewer" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (replace(REPORT, dense=replace(DENSE, latency_ms=float("nan"))), ValueError),
        (replace(REPORT, settings={"root": Path("data")}), TypeError),
    ],
)
def test_what_json_cannot_write_leaves_the_old_report(tmp_path: Path, broken: Report, error: type[Exception]) -> None:
    paths = write_report(REPORT, tmp_path)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(error):
        write_report(broken, tmp_path)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_without_matplotlib_the_numbers_are_written_before_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="figures"):
        write_report(REPORT, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert len(write_report(REPORT, tmp_path, figure=False)) == 2
