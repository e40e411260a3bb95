"""The record of convolutions that became blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightning_compress.conv_substitution.blocks import FORMS
from lightning_compress.replacement.record import ReplacedStructure
from lightning_compress.replacement.swap import Replaced


class ConvBlockStructure(ReplacedStructure):
    """The record of convolutions that became blocks."""

    kind: ClassVar[str] = "conv_block"
    forms: ClassVar[Mapping[str, type[Replaced]]] = FORMS
