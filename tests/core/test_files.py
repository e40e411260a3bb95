from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lightning_compress.core.files import replacing


def test_the_file_appears_with_the_end_of_the_block(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent, "a rename across file systems is a copy"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail_halfway() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["a" * 255, "漢" * 85, "é" * 127, "😀" * 63], ids=["ascii", "3 bytes", "2", "4"])
def test_a_name_as_long_as_the_file_system_takes(name: str, tmp_path: Path) -> None:
    for content in ("old", "new"):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text(content)
    assert (tmp_path / name).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_no_link_that_lies_in_wait_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, target = tmp_path / "victim", tmp_path / "a.json"
    victim.write_text("mine")
    names = iter(["aa", "bb"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(names))
    for name in (".a.json.aa.tmp", f".a.json.{os.getpid()}.tmp", ".a.json.tmp"):
        (tmp_path / name).symlink_to(victim)
    with replacing(target) as temporary:
        assert temporary.name == ".a.json.bb.tmp", "a name that is taken is not used"
        assert not temporary.is_symlink()
        temporary.write_text("new")
    assert victim.read_text() == "mine"
    assert target.read_text() == "new"
    assert not target.is_symlink()


def test_a_file_that_is_put_in_the_place_of_the_temporary_one_is_not_saved(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "a.json"
    victim.write_text("mine")
    target.write_text("old")

    def save() -> None:
        with replacing(target) as temporary:
            temporary.unlink()
            temporary.symlink_to(victim)

    with pytest.raises(OSError, match="was replaced by something else"):
        save()
    assert target.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "victim"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_file_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    target.chmod(mode)
    with replacing(target) as temporary:
        assert not stat.S_IMODE(temporary.stat().st_mode) & 0o077 & ~mode, "nobody else may read it meanwhile"
        temporary.write_text("new")
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    with replacing(tmp_path / "ours") as temporary:
        temporary.write_text("new")
    (tmp_path / "usual").write_text("new")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_threads_that_write_one_path_never_fail_and_leave_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    failures: list[BaseException] = []
    contents = [str(number) * 100_000 for number in range(4)]

    def write(content: str) -> None:
        try:
            for _ in range(20):
                with replacing(target) as temporary:
                    temporary.write_text(content)
                assert target.read_text() in contents
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == [target]


WRITER = """
import sys
from lightning_compress.core.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_what_a_killed_process_left_goes_with_the_next_save_and_no_live_ones_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 2
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    with replacing(target) as temporary:
        temporary.write_text("new")
    left = [path for path in tmp_path.iterdir() if path != target]
    assert [path.read_text() for path in left] == ["half"], "the live one's"
    assert processes[1].communicate("\n", timeout=30)[0] == ""
    assert processes[1].returncode == 0
    assert target.read_text() == "half"
    assert list(tmp_path.iterdir()) == [target]


def test_a_long_name_is_saved(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 250)
    with replacing(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
