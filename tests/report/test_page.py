from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.pages import EVIL, evil, report, sweep

from lightning_compress.report import Comparison, Report, Run, gather, write_report
from lightning_compress.report.page import (
    can_write_page,
    comparison_page,
    report_page,
    write_comparison_page,
    write_report_page,
)
from lightning_compress.report.page.points import best, front, in_frame, places
from lightning_compress.report.page.runs import recipes

drawn = pytest.mark.skipif(not can_write_page(), reason="needs the extra page: vl-convert-python")
MEGABYTE = 1_000_000


class Page(HTMLParser):
    """The elements and texts of a page, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.texts.append(data)

    def charts(self) -> list[dict[str, object]]:
        data = [i for i, (tag, one) in enumerate(self.elements) if tag == "script" and "type" in one]
        order = [i for i, (tag, _) in enumerate(self.elements) if tag == "script"]
        return [json.loads(self.scripts[order.index(i)]) for i in data]


@drawn
@pytest.mark.parametrize("page", [report_page(report(0.5)), comparison_page(sweep())] if can_write_page() else [])
def test_a_page_has_everything_inside(page: str) -> None:
    assert len(page.encode()) < 2 * MEGABYTE
    found = Page(page)
    loading = [(tag, key) for tag, one in found.elements for key in one if key in ("src", "srcset", "data", "poster")]
    assert loading == []
    assert [one["href"] for tag, one in found.elements if tag == "link"] == ["data:,"]
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(one["content"] for tag, one in found.elements if "http-equiv" in one)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


@drawn
def test_a_page_of_one_run_says_what_was_done() -> None:
    page = Page(report_page(replace(report(0.5), busy=True, before_recovery=None)))
    text = " ".join(page.texts)
    for said in ("first", "50.00 %", "lightning-compress amount=0.5", "the machine was busy", "before recovery"):
        assert said in text
    bytes_, macs, metric, sparsity = page.charts()  # a busy machine has no chart of the latency
    assert [one["data"]["values"][0]["x"] for one in (bytes_, macs)] == [40_000, 50_000]  # type: ignore[index]
    assert [one["value"] for one in sparsity["data"]["values"]][-1] == 0.5  # type: ignore[index]
    assert len(metric["data"]["values"]) == 10  # type: ignore[index,arg-type]


@drawn
def test_every_run_is_in_the_table_and_has_its_layers() -> None:
    comparison = sweep(12)
    page = Page(comparison_page(comparison))
    rows = [one["data-run"] for tag, one in page.elements if tag == "tr" and "data-run" in one]
    assert rows == [str(i) for i in range(1, 13)]
    assert next(one["id"] for tag, one in page.elements if tag == "template") == f"run-{rows[0]}"
    assert len([one for tag, one in page.elements if tag == "template"]) == 12
    values = [one["data-value"] for tag, one in page.elements if tag == "td" and "data-value" in one]
    assert str(comparison.runs[5].report.compressed.file_bytes) in values
    text = "".join(page.texts)
    assert all(run.name in text for run in comparison.runs)
    assert all(str(run.report.command) in text for run in comparison.runs)


def test_a_recipe_is_what_differs_in_the_settings_or_else_on_the_command_line() -> None:
    comparison = sweep(3)
    assert recipes(comparison.runs)[1] == "amount=0.317"
    many = [
        replace(
            run,
            report=replace(
                run.report,
                settings={f"key{j}": i for j in range(9)},
                command=f"lightning-compress seed=1 'compress=[a,b{i}]'" if i else None,
            ),
        )
        for i, run in enumerate(comparison.runs)
    ]
    assert recipes(many[1:]) == ["compress=[a,b1]", "compress=[a,b2]"]
    assert recipes(many)[0] == ""


@drawn
def test_names_are_no_html() -> None:
    both = Comparison((Run(EVIL, evil()), Run("other", report(0.2))), unreadable=(EVIL,))
    for page in (report_page(evil()), comparison_page(both)):
        found = Page(page)
        # The library, the page's own script, and data: an escaped name makes no element of its own.
        assert not [one for one in found.scripts if one.strip() == "alert(1)"]
        assert len(found.charts()) + 2 == len(found.scripts)
        assert "alert(1)" in "".join(found.texts)
        body = page.partition("<body>")[2]
        for script in found.scripts:
            body = body.replace(script, "")
        assert EVIL not in body
        for _, attributes in found.elements:
            assert set(attributes) <= {
                *("class", "charset", "content", "data-run", "data-value", "http-equiv", "href", "id", "lang", "name"),
                *("rel", "role", "style", "type", "aria-label", "aria-live", "aria-hidden", "viewbox", "d", "cx", "cy"),
                "r",
            }


@drawn
def test_a_large_sweep_stays_small_and_says_what_it_leaves_out() -> None:
    one = report(0.5)
    layers = tuple(replace(one.layers[0], name=f"encoder.layers.{i}.attention.projection") for i in range(100))
    many = Comparison(tuple(Run(f"run/{i}", replace(one, layers=layers)) for i in range(300)))
    page = comparison_page(many)
    assert len(page.encode()) < 2 * MEGABYTE
    text = "".join(Page(page).texts)
    assert re.search(r"Layers and epochs of \d+ runs, which would make this page too large", text)


@drawn
def test_a_page_links_to_the_pages_of_runs_that_have_one(tmp_path: Path) -> None:
    for i, name in enumerate(("a b#1", "plain")):
        write_report(report(0.1 + 0.1 * i), tmp_path / name, figure=False)
    write_report_page(report(0.1), tmp_path / "a b#1")
    path = write_comparison_page(gather(tmp_path), tmp_path)
    assert path == tmp_path / "report.html"
    links = [one["href"] for tag, one in Page(path.read_text()).elements if tag == "a"]
    assert [link for link in links if link != "#all"] == ["a%20b%231/report.html"]


@drawn
def test_what_was_not_tested_has_tables_and_no_charts_of_costs() -> None:
    one = report(0.5)
    untested = replace(
        one,
        dense=replace(one.dense, test_metric=None),
        compressed=replace(one.compressed, test_metric=None),
        metric=None,
        history=(),
        layers=(),
    )
    for page in (report_page(untested), comparison_page(Comparison((Run("a", untested),)))):
        found = Page(page)
        text = " ".join(found.texts)
        assert "Nothing was tested" in text
        assert "No epoch was recorded" in text
        assert found.charts() == []


def test_the_front_is_what_brute_force_finds() -> None:
    generator = random.Random(0)
    for _ in range(200):
        points = [(generator.randrange(6), generator.randrange(6)) for _ in range(generator.randrange(1, 9))]
        for mode, sign in (("max", 1), ("min", -1)):
            beaten = {
                i
                for i, (cost, metric) in enumerate(points)
                for other, (cost2, metric2) in enumerate(points)
                if cost2 <= cost and sign * metric2 >= sign * metric
                if (cost2, metric2) != (cost, metric) or other < i
            }
            found = front(points, mode)  # type: ignore[arg-type]
            assert set(found) == set(range(len(points))) - beaten
            assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_dense_networks_of_a_sweep_are_one_point() -> None:
    known = [(i, run, "") for i, run in enumerate(sweep(3).runs, start=1)]
    later = replace(known[1][1].report, dense=replace(known[1][1].report.dense, latency_ms=2.1))
    known[1] = (2, Run("later", later), "")
    kinds = [one.kind for one in places(known)]
    assert kinds.count("dense") == 1
    assert kinds.count("compressed") == 3


def test_a_busy_machine_gives_no_latency() -> None:
    busy = replace(report(0.5), busy=True)
    assert [one.latency_ms for one in places([(1, Run("a", busy), "")])] == [None, None]


def test_networks_that_collapsed_are_outside_the_charts() -> None:
    known = [(i, run, "") for i, run in enumerate(sweep(12).runs, start=1)]
    collapsed = replace(report(0.99), compressed=replace(report(0.99).compressed, test_metric=0.1))
    everything = places([*known, (13, Run("collapsed", collapsed), "")])
    assert [one.run for one in everything if one not in in_frame(everything, "max")] == [13]
    assert in_frame(everything, None) == everything


def test_the_run_shown_first_is_the_best_and_of_equal_ones_the_smallest() -> None:
    small = replace(report(0.5), compressed=replace(report(0.0).compressed, file_bytes=5))
    known = [(1, Run("a", report(0.9)), ""), (2, Run("b", report(0.0)), ""), (3, Run("c", small), "")]
    assert best(known, small.tested) == 3


def test_without_the_library_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.report.page import write

    write._library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ImportError, match=r"lightning-compress\[page\]"):
        write_report_page(report(0.5), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_keeps_its_command(tmp_path: Path) -> None:
    write_report(report(0.5), tmp_path, figure=False)
    assert Report.load(tmp_path / "report.json").command == "lightning-compress amount=0.5"
    content = json.loads((tmp_path / "report.json").read_text())
    del content["command"]  # as earlier versions wrote it
    content["format"] = 4
    assert Report.from_dict(content).command is None
