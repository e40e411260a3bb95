"""A run's file, loaded and tested by a process that knows nothing of the run but its config."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# What a launcher tells a rank: a process that inherits it would take itself for one, and wait for the others.
_OF_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
_OF_LAUNCHERS = ("MASTER_", "ROLE_", "TORCHELASTIC_", "SLURM_", "PL_")
_ROUNDING = 1e-5  # relative; of float32 means, in another order. One of 10,000 samples is 1e-4


def verify(path: Path, *, metric: str | None, expected: float | None, exact: bool) -> str:
    """Test a run's file in a new process; return in words that its accuracy is the expected one.

    Args:
        path: The file, beside the config.yaml of its run.
        metric: What is compared; None: the file is loaded, and nothing else.
        expected: Its value in the run.
        exact: Whether it must be the same float. Other ranks, or a GPU, add up a mean in another order.

    Raises:
        ValueError: It is another one, or the process failed.
    """
    found = in_new_process(path)
    start = f"{path.name}, {path.stat().st_size:,} bytes, loaded in a new process"
    if metric is not None and expected is None:
        return f"{start}; the run found no number for {metric} that could be compared"
    if metric is None or expected is None:
        return f"{start}; with metric=null there is nothing to compare"
    check_same(found[metric], expected, what=f"{path}, loaded in a new process: {metric}", exact=exact)
    return f"{start}: {metric} {found[metric]:.4f}, the same"


def check_same(found: float | None, expected: float, *, what: str, exact: bool) -> None:
    """Refuse an accuracy that is not the expected one.

    Raises:
        ValueError: They differ, by more than the rounding of a mean where it need not be `exact`.

    Example:
        >>> check_same(0.98760003, 0.9876, what="test_acc", exact=False)
        >>> check_same(0.98760003, 0.9876, what="test_acc", exact=True)
        Traceback (most recent call last):
        ValueError: test_acc is 0.98760003, and the compressed network of this run had 0.9876. ...
    """
    if found == expected:
        return
    if not exact and found is not None and math.isclose(found, expected, rel_tol=_ROUNDING):
        return
    reason = "random numbers in test_step, data that differ from process to process, state outside of the state dict"
    if not exact:
        reason += ", or a value of several ranks that is no mean over samples (a torchmetrics Metric is one)"
    raise ValueError(
        f"{what} is {found!r}, and the compressed network of this run had {expected!r}. The weights in the file are "
        f"those of the network; look for what else the test depends on: {reason}."
    )


def in_new_process(path: Path) -> dict[str, float | None]:
    """Return what `task=test` finds for a file in a new process, which imports from where this one does.

    None stands for what is no number.

    Raises:
        ValueError: The process failed; the message has its last words.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_RANKS and not name.startswith(_OF_LAUNCHERS)
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "PYTHONSAFEPATH": "1",  # and from nowhere else
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums are the same
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        task = ["task=test", f"path={_quoted(path.absolute())}", f"json={_quoted(answer)}"]
        command = [sys.executable, "-m", "lightning_compress.cli", *task]
        # Not where this process works: Hydra takes a folder called ${x} for an interpolation.
        done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise ValueError(f"{path} could not be tested in a new process:\n{done.stderr.strip()[-2000:]}")
        numbers: dict[str, float | None] = json.loads(answer.read_text())
    return numbers


def escaped(text: str) -> str:
    """Return a string that OmegaConf reads as the given one, where this has what looks like an interpolation.

    Example:
        >>> print(escaped("runs/${name}"))
        runs/\\${name}
    """
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _quoted(path: Path) -> str:
    """As Hydra's command line wants what may hold blanks, commas, brackets and interpolations."""
    closing = re.compile(r"(\\*)('|\Z)")  # backslashes count before a quote, and only there
    return "'" + closing.sub(lambda found: 2 * found[1] + ("\\'" if found[2] else ""), escaped(str(path))) + "'"
