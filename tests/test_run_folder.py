"""A run folder is code, and the commands that call it say so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lightning_compress.recorded import recorded_config


def test_who_opens_a_run_folder_is_told_once_that_it_is_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text("model: {_target_: torch.nn.Identity}")
    with caplog.at_level(logging.INFO, logger="lightning_compress.recorded"):
        assert recorded_config(tmp_path) is not None
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("A run folder is code")
    assert str(tmp_path / "config.yaml") in said
    caplog.clear()
    assert recorded_config(tmp_path / "none") is None
    assert not caplog.records
