"""Launches in which the parent process gets its weights back by a load into the unchanged module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import TESTS

SCRIPT = """
import warnings
from lightning.pytorch import seed_everything
from lightning_compress import DistillationModule, IterativePruningCallback
from support.small import SmallModule, plain, quiet_trainer, shuffled

if __name__ == "__main__":
    seed_everything(1)
    module = {module}
    callback = IterativePruningCallback(0.75, end_epoch=1.0)
    quiet_trainer(strategy={strategy!r}, devices=2, max_epochs=2, callbacks=[callback]).fit(module, shuffled(), plain())
    weights = [module.net.conv.weight, module.net.hidden.weight, module.net.head.weight]
    print("zeros", sum(int((w == 0).sum()) for w in weights), "of", sum(w.numel() for w in weights))
"""


ALONE, DISTILLED = "SmallModule()", "DistillationModule(SmallModule(), SmallModule())"


@pytest.mark.parametrize(
    ("strategy", "module"),
    [
        ("ddp_fork", DISTILLED),
        pytest.param("ddp_fork", ALONE, marks=pytest.mark.slow),
        pytest.param("ddp_spawn", ALONE, marks=pytest.mark.slow),
        pytest.param("ddp_spawn", DISTILLED, marks=pytest.mark.slow),
    ],
)
def test_the_parent_gets_the_masked_weights(strategy: str, module: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(strategy=strategy, module=module))
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    total = 6 * 3 + 16 * 72 + 3 * 16
    assert f"zeros {round(0.75 * total)} of {total}" in done.stdout
