"""The check of a run's compressed file: a new process, which has only the run's config, loads and tests it."""

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

# Variables that launchers set for a rank. A process that inherits them would act as a rank, and wait for the others.
_OF_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
_OF_LAUNCHERS = ("MASTER_", "ROLE_", "TORCHELASTIC_", "SLURM_", "PL_")
_ROUNDING = 1e-5  # relative, of float32 means that are summed in another order; one of 10,000 samples makes 1e-4


def verify(path: Path, *, metric: str | None, expected: float | None, exact: bool) -> str:
    """Test a run's file in a new process, and return a sentence that says what was compared.

    Args:
        path: The file, in the same folder as the config.yaml of its run.
        metric: Name of the metric to compare; with None the file is only loaded.
        expected: Value of the metric in the run.
        exact: Whether both values must be the same float. Several ranks, or a GPU, sum a mean in another order.

    Raises:
        ValueError: The metric has another value, or the process failed.
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
    """Refuse a value that is not the expected one.

    Raises:
        ValueError: The values differ, or, with exact=False, differ by more than the rounding error of a mean.

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
    """Run `task=test` on a file in a new process, with the import path of this process, and return the metrics.

    A metric that was NaN or infinite is None.

    Raises:
        ValueError: The process failed; the message contains the end of its error output.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_RANKS and not name.startswith(_OF_LAUNCHERS)
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "PYTHONSAFEPATH": "1",  # no other folder may come first on the import path
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # the order of sums depends on it
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        task = ["task=test", f"path={_quoted(path.absolute())}", f"json={_quoted(answer)}"]
        command = [sys.executable, "-m", "lightning_compress.cli", *task]
        # The new process works in the temporary folder: Hydra reads a folder called ${x} as an interpolation.
        done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise ValueError(f"{path} could not be tested in a new process:\n{done.stderr.strip()[-2000:]}")
        numbers: dict[str, float | None] = json.loads(answer.read_text())
    return numbers


def escaped(text: str) -> str:
    """Return a string that OmegaConf reads as the given text, even where the text looks like an interpolation.

    Example:
        >>> print(escaped("runs/${name}"))
        runs/\\${name}
    """
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _quoted(path: Path) -> str:
    """Return a path in quotes, so that Hydra's command line accepts blanks, commas, brackets and interpolations."""
    closing = re.compile(r"(\\*)('|\Z)")  # Hydra reads backslashes as escapes before a quote only
    return "'" + closing.sub(lambda found: 2 * found[1] + ("\\'" if found[2] else ""), escaped(str(path))) + "'"
