"""Arrows go one way: core <- functional code <- trainer glue and callbacks <- hydra and cli."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_compress

PACKAGE = Path(lightning_compress.__file__).parent
FRAMEWORKS = {"lightning", "pytorch_lightning", "hydra", "omegaconf"}
HYDRA_FILES = {"hydra.py", "cli.py", "__main__.py"}
GLUE = {
    *("callback.py", "module.py", "group_lasso.py", "watching.py", "removing.py", "backtracking.py"),
    *(
        "objective.py",
        "finding.py",
        "hinting.py",
        "quantizing.py",
        "clustering.py",
        "latent_callback.py",
        "binary.py",
        "uniform.py",
    ),
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if "conf" not in path.parts)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(path: Path) -> str:
    """core | functional | trainer | glue | baselines | report | tasks | app | root"""
    room = path.parts[0]
    if len(path.parts) == 1:
        return "app" if room in HYDRA_FILES else "root"
    if room in ("core", "trainer", "report", "baselines", "tasks"):
        return room
    return "glue" if path.name in GLUE else "functional"


MAY_IMPORT = {
    "core": {"core"},
    "functional": {"core", "functional"},
    "trainer": {"core", "trainer"},
    "glue": {"core", "functional", "trainer", "glue"},  # of the same room
    "baselines": {"core", "trainer", "baselines"},
    "report": {"core", "report"},
    "tasks": {"core", "functional", "trainer", "glue", "report", "tasks"},
    "app": {"core", "functional", "trainer", "glue", "baselines", "report", "tasks", "app", "root"},
    "root": {"core", "functional", "trainer", "glue", "baselines", "report"},
}
MAY_USE = {
    "core": set(),
    "functional": set(),
    "trainer": {"lightning"},
    "glue": {"lightning"},
    "baselines": {"lightning"},
    "tasks": {"lightning"},
    "report": {"lightning"},
    "app": {"lightning", "hydra", "omegaconf"},
    "root": set(),
}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    mine = layer(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] in FRAMEWORKS:
            assert parts[0] in MAY_USE[mine], f"{path} ({mine}) imports {name}"
        if parts[0] != "lightning_compress" or len(parts) == 2:
            continue
        target = Path(*parts[1:-1]).with_suffix(".py")
        target = target if (PACKAGE / target).is_file() else Path(*parts[1:]).with_suffix(".py")
        if (PACKAGE / target).is_file():
            assert layer(target) in MAY_IMPORT[mine], f"{path} ({mine}) imports {name} ({layer(target)})"
            if layer(target) == "glue" and mine == "glue":
                assert target.parts[0] == path.parts[0], f"{path} imports another room's callback, {name}"


TECHNIQUES = ("pruning", "quantization", "distillation")


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] in TECHNIQUES], ids=str)
def test_no_technique_looks_at_another(path: Path) -> None:
    """They meet in `trainer` alone: no room imports another one, or looks through the callbacks of a Trainer."""
    for name in imported(path):
        room = name.split(".")[1] if name.startswith("lightning_compress.") else path.parts[0]
        assert room == path.parts[0] or room not in TECHNIQUES, f"{path} imports {name}"
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        assert not (isinstance(node, ast.Attribute) and node.attr == "callbacks"), f"{path}:{node.lineno}"


def test_the_arrows_are_really_read() -> None:
    assert "lightning_compress.core.swap.Projection" in imported(Path("trainer/callback.py"))
    assert layer(Path("trainer/callback.py")) == "trainer"
    assert layer(Path("pruning/callback.py")) == "glue"
