"""Arrows go one way: core <- functional code <- trainer glue and callbacks <- hydra and cli."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_compress
from lightning_compress.core.records import KINDS

PACKAGE = Path(lightning_compress.__file__).parent
FRAMEWORKS = {"lightning", "pytorch_lightning", "hydra", "omegaconf"}
HYDRA_FILES = {"hydra.py", "recorded.py", "cli.py", "__main__.py"}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if "conf" not in path.parts)
SHARED = {"core", "measure", "channels", "stages", "replacement", "trainer", "baselines", "report", "tasks"}
ROOMS = {path.parts[0] for path in FILES if len(path.parts) > 1} - SHARED
TECHNIQUES = ROOMS - {"coding", "deploy"}


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
    """A directory that rooms share, or functional | glue | app | root.

    A room's files are glue if they import Lightning or `trainer`, and functional code if they do not.
    """
    room = path.parts[0]
    if len(path.parts) == 1:
        return "app" if room in HYDRA_FILES else "root"
    if room not in ROOMS:
        return room
    meets = {name.split(".")[0] for name in imported(path)} & FRAMEWORKS
    return (
        "glue"
        if meets or any(name.startswith("lightning_compress.trainer.") for name in imported(path))
        else "functional"
    )


_BELOW = {"core", "measure", "channels", "stages", "replacement"}
MAY_IMPORT = {
    "core": {"core"},
    "measure": {"core", "measure"},
    "channels": {"core", "measure", "channels"},
    "stages": {"core", "measure", "stages"},
    "replacement": {"core", "measure", "replacement"},
    "trainer": _BELOW | {"trainer"},
    "functional": _BELOW | {"functional"},
    "glue": _BELOW | {"functional", "trainer", "glue"},  # of the same room
    "baselines": {"core", "trainer", "baselines"},
    "report": {"core", "measure", "report"},
    "tasks": _BELOW | {"functional", "trainer", "glue", "report", "tasks"},
    "app": _BELOW | {"functional", "trainer", "glue", "baselines", "report", "tasks", "app", "root"},
    "root": _BELOW | {"functional", "trainer", "glue", "baselines", "report"},
}
MAY_USE = {
    "trainer": {"lightning"},
    "glue": {"lightning"},
    "baselines": {"lightning"},
    "tasks": {"lightning"},
    "report": {"lightning"},
    "app": {"lightning", "hydra", "omegaconf"},
}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    mine = layer(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] in FRAMEWORKS:
            assert parts[0] in MAY_USE.get(mine, set()), f"{path} ({mine}) imports {name}"
        if parts[0] != "lightning_compress" or len(parts) == 2:
            continue
        target = Path(*parts[1:-1]).with_suffix(".py")
        target = target if (PACKAGE / target).is_file() else Path(*parts[1:]).with_suffix(".py")
        if (PACKAGE / target).is_file():
            assert layer(target) in MAY_IMPORT[mine], f"{path} ({mine}) imports {name} ({layer(target)})"
            if layer(target) == "glue" and mine == "glue":
                assert target.parts[0] == path.parts[0], f"{path} imports another room's callback, {name}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] in TECHNIQUES], ids=str)
def test_no_technique_looks_at_another(path: Path) -> None:
    """They meet in `trainer` alone: no room imports another one, or looks through the callbacks of a Trainer."""
    for name in imported(path):
        room = name.split(".")[1] if name.startswith("lightning_compress.") else path.parts[0]
        assert room == path.parts[0] or room not in TECHNIQUES, f"{path} imports {name}"
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        assert not (isinstance(node, ast.Attribute) and node.attr == "callbacks"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_loaded_without_a_callback(kind: str) -> None:
    """What rebuilds a network from its records is functional code, which meets neither Lightning nor `trainer`."""
    path = Path(*KINDS[kind].split(".")[1:-1]).with_suffix(".py")
    assert layer(path) in {"core", "channels", "functional"}


def test_the_arrows_are_really_read() -> None:
    assert "lightning_compress.core.projection.Projection" in imported(Path("trainer/callback.py"))
    assert layer(Path("trainer/callback.py")) == "trainer"
    assert layer(Path("pruning/callback.py")) == "glue"
