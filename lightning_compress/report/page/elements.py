"""Pieces of HTML. Every text that comes from a run is escaped here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

SHORT = 24  # characters of a name that stays in one line
HERE = Path(__file__).parent
SHAPES = {  # the marks of the charts, for the legend
    "dense": '<path class="dense" d="M6 0 11 6 6 12 1 6z"/>',
    "compressed": '<circle class="accent" cx="6" cy="6" r="4.5"/>',
    "point": '<path class="accent" d="M6 1.5 11 10.5H1z"/>',
    "control": '<path class="other" d="M1.5 1.5h9v9h-9z"/>',
}
OTHER = '<path class="other" d="M4.5 1h3v3.5H11v3H7.5V11h-3V7.5H1v-3h3.5z"/>'
# No address is allowed, so the browser itself refuses whatever would be loaded.
ALLOWED = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def text(words: str) -> str:
    """Return a text escaped for HTML, in which a long name may be broken behind a slash, a dot or an underscore.

    Example:
        >>> text("a < b"), text("a_long_name/of_a_run/in_a_sweep")
        ('a &lt; b', 'a_<wbr>long_<wbr>name/<wbr>of_<wbr>a_<wbr>run/<wbr>in_<wbr>a_<wbr>sweep')
    """
    return escape(words) if len(words) <= SHORT else re.sub(r"(?<=\w)[._=/]+(?=\w)", r"\g<0><wbr>", escape(words))


def document(title: str, body: Iterable[str], scripts: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: Title of the window.
        body: The page's elements.
        scripts: Contents of its scripts, which must be trusted.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{ALLOWED}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body><main>",
            *body,
            "</main>",
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>",
            "",
        ]
    )


def json_text(content: Any) -> str:
    """Return data for a script, in which no text can end the script's element.

    Example:
        >>> json_text("</script>")
        '"\\\\u003c/script>"'
    """
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def chart(spec: dict[str, Any], title: str, *, wide: bool = False) -> str:
    """Return a chart below its title, which a script draws."""
    kind = "chart wide" if wide else "chart"
    label = escape(title, quote=True)
    return (
        f'<figure class="{kind}"><figcaption>{label}</figcaption>'
        f'<div class="plot" role="img" aria-label="{label}"></div>'
        f'<script type="application/json">{json_text(spec)}</script></figure>'
    )


def legend(kinds: dict[str, str], *, front: bool) -> str:
    """Return the legend of the marks in the charts."""
    marks = [
        f'<span><svg viewBox="0 0 12 12" aria-hidden="true">{SHAPES.get(kind, OTHER)}</svg>{escape(text)}</span>'
        for kind, text in kinds.items()
    ]
    if front:
        step = '<svg viewBox="0 0 18 12" aria-hidden="true"><path class="step" d="M0 10h8V3h10"/></svg>'
        marks.append(f"<span>{step}Pareto front: nothing that costs less is as good</span>")
    return f'<p class="legend">{"".join(marks)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1, name: str = "") -> str:
    """Return a table of plain text.

    Args:
        header: The columns' headings.
        rows: The cells.
        text_columns: Number of the first columns, which are aligned to the left; numbers follow.
        name: Class of the table.
    """

    def cells(row: Sequence[str], tag: str) -> str:
        words = [f'<{tag} class="text">{text(cell)}</{tag}>' for cell in row[:text_columns]]
        return "".join([*words, *(f"<{tag}>{escape(cell)}</{tag}>" for cell in row[text_columns:])])

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{name}"><thead><tr>{cells(header, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def listed(sentences: Iterable[str]) -> str:
    """Return a list of sentences; nothing where there are none."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def command(line: str | None) -> str:
    """Return the command that repeats a run."""
    if line is None:
        return (
            "<p>The run was started from Python, or before reports had the command; report.json has its settings.</p>"
        )
    return f"<pre>{escape(line)}</pre>"
