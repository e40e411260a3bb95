"""Every example runs as it stands, and reaches what it prints."""

from __future__ import annotations

import logging
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FLOOR = {  # accuracies; and, where it is negative, an error that is not exceeded
    "budget_controller": 0.85,
    "distillation": 0.9,
    "early_exit_stream": 0.85,
    "existing_module": 0.93,
    "hand_written_loop": 0.95,
    "lottery_ticket": 0.88,
    "matrix_factorization": -0.6,
    "own_technique": 0.9,
    "transformers_model": 0.95,
}


def test_every_script_is_run_here_or_by_test_own_app() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(FLOOR)
    assert all(len(path.read_text().splitlines()) < 80 for path in EXAMPLES.rglob("*.py"))


@pytest.fixture(autouse=True)
def _loggers_stay_as_they_are() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")  # an example makes it quieter, and other tests read it
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", FLOOR)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"test (accuracy|error) (\d\.\d+) with .*", last)
    assert found is not None, last
    assert float(found[2]) * (1 if found[1] == "accuracy" else -1) >= FLOOR[name]
