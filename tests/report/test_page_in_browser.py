"""report.html in headless Chromium: `pip install playwright`, and a chromium or google-chrome on the path."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.pages import evil, report, sweep

from lightning_compress.report import Comparison, Run
from lightning_compress.report.page import can_write_page, write_comparison_page, write_report_page

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is installed"),
    pytest.mark.skipif(not can_write_page(), reason="needs the extra page: vl-convert-python"),
]
MARKS = ".charts.three .chart:nth-child({}) .plot svg .mark-symbol.role-mark.layer_2_marks path"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    both = Comparison((Run("<img src=x onerror=alert(1)>", evil()), Run("other", report(0.2))))
    busy = replace(report(0.3), busy=True, before_recovery=None)
    return {
        "run": write_report_page(report(0.5), folder / "run"),
        "busy": write_report_page(busy, folder / "busy"),
        "sweep": write_comparison_page(sweep(12), folder / "sweep"),
        "evil": write_report_page(evil(), folder / "evil"),
        "evil sweep": write_comparison_page(both, folder / "evil_sweep"),
    }


class Opened:
    """An opened page, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_context(**options).new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.address = path.as_uri()
        self.page.goto(self.address)
        self.page.wait_for_selector("body[data-drawn]")

    def chosen(self) -> str:
        return str(self.page.locator("#chosen h2").inner_text())

    def column(self, name: str) -> list[str]:
        heads = [head.strip() for head in self.page.locator(".runs th").all_inner_texts()]
        column = next(i for i, head in enumerate(heads, start=1) if head == name)
        return list(self.page.locator(f".runs tbody td:nth-child({column})").all_inner_texts())

    def sort(self, name: str) -> list[str]:
        self.page.get_by_role("button", name=name, exact=True).first.click()
        return self.column(name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "busy", "sweep", "evil", "evil sweep"])
def test_a_page_opens_without_errors_or_requests(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    opened = Opened(browser, pages[name], color_scheme=scheme)
    figures = opened.page.locator(".chart").count()
    assert figures == opened.page.locator(".chart .plot > svg").count() > 0
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [opened.address]
    assert opened.page.locator("main script:not([type]), main img").count() == 0
    dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("name", ["run", "sweep", "evil sweep"])
def test_a_phone_scrolls_in_one_direction(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened = Opened(browser, pages[name], viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    widths = opened.page.evaluate("[...document.querySelectorAll('.plot svg')].map(one => one.clientWidth)")
    assert all(200 < width <= 390 for width in widths)


def test_a_point_names_its_recipe_and_opens_its_layers(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["sweep"])
    assert opened.chosen().startswith("Run 1 ")  # the best one
    marks = opened.page.locator(MARKS.format(1))
    point = next(one for one in marks.all() if "8: compressed" in _described(one))
    point.hover()
    tooltip = opened.page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert "amount=0.554" in tooltip.inner_text()
    assert f"{sweep(12).runs[7].report.compressed.file_bytes:,} bytes" in tooltip.inner_text()
    point.click()
    opened.page.wait_for_function("document.querySelector('#chosen h2').innerText.startsWith('Run 8')")
    opened.page.wait_for_selector("#chosen .chart .plot > svg")
    assert opened.page.locator("#chosen .layers tbody tr td:nth-child(3)").all_inner_texts() == ["268", "178", "446"]
    assert opened.page.locator(".runs tr[aria-current]").get_attribute("data-run") == "8"
    assert opened.said == []


def test_a_row_opens_its_layers_by_mouse_and_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["sweep"])
    opened.page.locator(".runs tr[data-run='3'] td:last-child").click()
    assert opened.chosen().startswith("Run 3 ")
    opened.page.locator(".runs tr[data-run='5'] button").focus()
    opened.page.keyboard.press("Enter")
    assert opened.chosen().startswith("Run 5 ")
    assert "lightning-compress amount=0.317" in opened.page.locator("#chosen pre").inner_text()


def test_the_table_sorts_numbers_by_value_and_names_naturally(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["sweep"])
    sizes = [int(one.replace(",", "")) for one in opened.sort("file (bytes)")]
    assert sizes == sorted(sizes)
    assert opened.page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    sizes = [int(one.replace(",", "")) for one in opened.sort("file (bytes)")]
    assert sizes == sorted(sizes, reverse=True)
    assert opened.sort("run") == [f"run/{i}" for i in range(12)]
    assert opened.said == []


def test_a_page_prints(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["sweep"])
    opened.page.emulate_media(media="print")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.page.evaluate("getComputedStyle(document.querySelector('.all')).maxHeight") == "none"
    printed = opened.page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert len(printed) > 20_000
    assert opened.said == []


def _described(mark: Any) -> str:
    """Return what assistive technology reads of a mark, and its name among the data."""
    return str(mark.evaluate("one => `${one.__data__?.datum?.name} ${one.getAttribute('aria-label')}`")).lower()
