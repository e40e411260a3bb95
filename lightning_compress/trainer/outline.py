"""What a wrapper would add to a network, as a table of words, for a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outline:
    """The table of a dry run.

    Attributes:
        columns: Headings.
        rows: Words for each of them.
        note: A sentence below the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
