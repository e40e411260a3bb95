"""What the README shows is what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_ten_lines_run_and_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    weights = [p for name, p in names["module"].named_parameters() if name in names["pruning"].masks]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(0.9, abs=1e-4)
    assert float(names["trainer"].callback_metrics["test_acc"]) > 0.93


def test_what_the_peers_become_is_valid() -> None:
    from lightning_compress import IterativePruningCallback

    after = [line for block in blocks("python")[1:] for line in block.splitlines() if line.startswith("Iterative")]
    assert len(after) == 2
    for line in after:
        assert isinstance(eval(line), IterativePruningCallback)
