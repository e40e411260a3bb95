"""The resident memory of this process and its peak, as Linux counts them; imports nothing that would raise them."""

from __future__ import annotations

from pathlib import Path

_PROCESS = Path("/proc/self")


def can_measure() -> bool:
    """Whether this system counts a peak that can be reset."""
    return (_PROCESS / "clear_refs").exists()


def resident() -> int:
    """Return the bytes that this process holds now."""
    return _bytes("VmRSS")


def forget_peak() -> None:
    """Make the peak count from now on."""
    (_PROCESS / "clear_refs").write_text("5")


def peak() -> int:
    """Return the most bytes that this process has held since `forget_peak`."""
    return _bytes("VmHWM")


def _bytes(key: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
