"""The wheel, installed without the repository, serves somebody else's Hydra app."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: whatever else lies in the checkout is not to get into the wheel, nor the wheel into it.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("lightning_compress", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    for name in ("README.md", "LICENSE"):
        (source / name).write_text("")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_has_the_config_inside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"lightning_compress/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    assert not [name for name in names if name.startswith("conf/") or "__pycache__" in name]


def test_an_app_outside_the_repository_composes_the_groups(wheel: Path, tmp_path: Path) -> None:
    site, app = tmp_path / "site", tmp_path / "app"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    shutil.copytree(ROOT / "examples" / "own_app", app, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    (app / "sitecustomize.py").write_text(  # an editable install of the repository must not stand in for the wheel
        f"import atexit, sys\nsys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]\n"
        "atexit.register(lambda: print(sys.modules['lightning_compress'].__path__))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(app)]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "app.py",
        "trainer.max_epochs=6",
        "callbacks.iterative_pruning.amount=0.8",
        "hydra.run.dir=out",
    ]
    done = subprocess.run(command, cwd=app, env=environment, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, result, path = done.stdout.splitlines()
    assert path == str([str(site / "lightning_compress")])
    weights, biases = 64 * 128 + 128 * 10, 128 + 10
    assert f"{weights - round(0.8 * weights) + biases:,} of {weights + biases:,} parameters" in result
    assert (app / "out" / ".hydra" / "config.yaml").is_file()
