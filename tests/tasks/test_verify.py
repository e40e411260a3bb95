from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lightning_compress.tasks import verify as room
from lightning_compress.tasks.verify import escaped, in_new_process, verify


def test_another_accuracy_is_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "compressed.lcz"
    path.write_bytes(bytes(1234))
    monkeypatch.setattr(room, "in_new_process", lambda path: {"acc": 0.9875})
    told = verify(path, metric="acc", expected=0.9875, exact=True)
    assert told == "compressed.lcz, 1,234 bytes, loaded in a new process: acc 0.9875, the same"
    for exact, expected in ((True, 0.9875001), (False, 0.9876)):  # one of 10,000 samples
        with pytest.raises(ValueError, match=rf"acc is 0\.9875, and the compressed .* had {expected}\."):
            verify(path, metric="acc", expected=expected, exact=exact)
    assert verify(path, metric="acc", expected=0.9875001, exact=False) == told


def test_a_process_that_is_no_rank_and_whose_last_words_are_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\necho 'out of memory' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(sys, "path", ["", "/somewhere"])
    monkeypatch.chdir(tmp_path)
    of_a_rank = ["LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"]
    for name in of_a_rank:
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=r"network\.lcz could not be tested in a new process:\nout of memory"):
        in_new_process(Path("network.lcz"))
    environment = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    assert not environment.keys() & set(of_a_rank)
    assert environment["PYTHONPATH"] == f"{tmp_path}:/somewhere"


@pytest.mark.parametrize(
    "text",
    [r"a,b[c]{d}=(e) f", r"it's", r"\it\'s", "end\\", "end\\\\", "${x}", r"\${x}", r"\\$${x:${y}}", r"'${x}\\'$y\\"],
)
def test_any_path_comes_through_the_command_line_and_a_config(text: str) -> None:
    override = OverridesParser.create().parse_override(f"path={room._quoted(Path(text))}")
    for value in (override.value(), escaped(text)):
        assert OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create({"path": value}))).path == text
