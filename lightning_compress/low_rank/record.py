"""The record of layers of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightning_compress.low_rank.forms import FORMS
from lightning_compress.replacement.record import ReplacedStructure
from lightning_compress.replacement.swap import Replaced


class LowRankStructure(ReplacedStructure):
    """The record of layers of low rank."""

    kind: ClassVar[str] = "low_rank"
    forms: ClassVar[Mapping[str, type[Replaced]]] = FORMS
