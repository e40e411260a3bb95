"""What the README shows is what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.utils import get_object

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HEADINGS = ["What it does", "Use", "How it works", "Measured", "When it did not help", "Papers"]
MORE = {"coding": {"The format, version 2"}}
CARDS = [
    "block_pruning",
    "pruning",
    "group_lasso",
    "clustering",
    "conv_substitution",
    "binary",
    "quantization",
    "distillation",
    "early_exit",
    "channel_gates",
    "serving",
    "skipping",
    "slimmable",
    "coding",
    "deploy",
]
FILES = {room: f"lightning_compress/{room}/README.md" for room in CARDS} | {
    "tickets": "lightning_compress/pruning/TICKETS.md"
}
PAGES = ["README.md", "conf/README.md"]
PAGES += [f"lightning_compress/{room}/README.md" for room in (*CARDS, "trainer", "channels")]


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


def test_it_is_read_in_one_go() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    tables = [line for line in lines if line.startswith("|") or re.match(r"\d+\. ", line)]  # and their notes
    assert all(len(line) <= 120 for line in lines if line not in tables)


@pytest.mark.parametrize("room", FILES)
def test_every_method_card_has_the_same_headings(room: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / FILES[room]).read_text(), flags=re.DOTALL)
    found = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert [heading for heading in found if heading not in MORE.get(room, ())] == HEADINGS


@pytest.mark.parametrize(
    "path", ["README.md", "conf/README.md", "lightning_compress/trainer/README.md", *FILES.values()]
)
def test_links_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text()
    for link, _, anchor in (found.partition("#") for found in re.findall(r"\]\(([^)]*)\)", text)):
        target = (ROOT / path).parent / link
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-").replace(",", "") for heading in headings]


def test_functions_that_the_cards_name_exist() -> None:
    """Names such as `binary.binarize_weights`, of a room and something in it."""
    for room in CARDS:
        text = (ROOT / "lightning_compress" / room / "README.md").read_text()
        for name in set(re.findall(rf"`((?:core|{room})\.\w+(?:\.\w+)*)[`(]", text)):
            assert get_object(f"lightning_compress.{name}") is not None
