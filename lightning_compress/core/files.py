"""Write a file whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl

    _CAN_LOCK = True
except ImportError:  # Windows, where an open file can't be replaced
    _CAN_LOCK = False

_NAME = 100  # bytes of a file's name that its temporary name repeats: file systems limit names to 255
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, whose file replaces `path` when the block ends without an error.

    A reader sees the old file or the new one, never half of one; after an error or a kill the old one is still there.
    The temporary file has a random name, is created exclusively, and is locked while it is written. The next writer of
    the same path removes an unlocked file, which a killed process has left. The new file gets the old one's mode.

    Raises:
        OSError: The file can't be written, or something else took the temporary file's place meanwhile.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "report.json"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("{}")
        >>> target.read_text()
        '{}'
    """
    path = Path(path)
    stem = f".{path.name.encode(errors='surrogateescape')[:_NAME].decode(errors='ignore')}."
    _remove_leftovers(path.parent, stem)
    mode = _mode(path)
    temporary, descriptor = _make(path, stem, mode)
    try:
        yield temporary
        if not os.path.samestat(os.fstat(descriptor), os.lstat(temporary)):
            raise OSError(f"{temporary} was replaced by something else while {path} was written: nothing was saved.")
        os.fsync(descriptor)
        if mode is not None:
            os.chmod(temporary, mode)
        if not _CAN_LOCK:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        if _CAN_LOCK:
            os.close(descriptor)
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _mode(path: Path) -> int | None:
    """Return the permissions of an existing file."""
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode):
            return stat.S_IMODE(found.st_mode) & 0o777
    return None


def _make(path: Path, stem: str, mode: int | None) -> tuple[Path, int]:
    """Create an empty, locked file with a new name, which only those may read who may read `path`."""
    while True:
        temporary = path.with_name(f"{stem}{secrets.token_hex(8)}.tmp")
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK
            descriptor = os.open(temporary, flags, 0o666 if mode is None else 0o600)
        except FileExistsError:
            continue
        try:
            locked = _lock(descriptor)
        except OSError:  # without locks on this file system, no writer removes the file as a leftover either
            locked = True
        if locked and os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another writer took it for a leftover before it was locked


def _remove_leftovers(folder: Path, stem: str) -> None:
    """Remove the temporary files that no process has locked; do nothing where files can't be locked."""
    if not _CAN_LOCK:
        return
    pattern = re.compile(re.escape(stem) + r"[0-9a-f]+\.tmp")
    with suppress(OSError):  # creating the temporary file will raise the same error
        for name in [entry.name for entry in os.scandir(folder) if pattern.fullmatch(entry.name)]:
            with suppress(OSError):  # the file is gone meanwhile, is a link, or belongs to another user
                _remove_unlocked(folder / name)


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | _NO_LINK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and _lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed, or its process ends; False if another one has locked it."""
    if _CAN_LOCK:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
