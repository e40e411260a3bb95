from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from lightning_compress.coding import save_compressed


def test_the_table_fits_80_columns_with_every_number_on_one_line_and_names_as_they_are(tmp_path: Path) -> None:
    tensors = {"[red]encoder[/red].blocks.0.attention.in_proj_weight": torch.randn(768, 256), "bias": torch.zeros(3)}
    size = save_compressed(tensors, tmp_path / "network.lcz")
    output = io.StringIO()
    Console(file=output, width=80).print(size)
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = "".join(output.getvalue().split())
    assert f"{size.tensors[0].bytes:,.1f}" in output.getvalue()
    assert f"{size.tensors[0].bytes / size.bytes:.1%}" in output.getvalue()
    assert "/(nlog2k+kb)" in text, "the caption loses nothing"
    first_column = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    assert "[red]encoder[/red].blocks.0.attention.in_proj_weight" in first_column, "a name is no markup"
