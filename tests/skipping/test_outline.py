"""What a dry run says about blocks before anything is trained."""

from __future__ import annotations

import torch
from support.small import FEATURES, SmallModule

from lightning_compress import SkippableBlocks


def test_a_dry_run_lists_blocks_with_their_cost_and_time() -> None:
    x = torch.randn(4, FEATURES)
    module = SkippableBlocks(SmallModule(residual=True), target=0.6, network="net", example_inputs=x)
    for _ in range(2):  # with the gates that the first one has made, too
        outline = module.outline(x)
        assert outline is not None
        assert list(outline.columns) == ["block", "name", "MACs", "share", "ms", "of the time"]
        assert [row[1] for row in outline.rows] == ["block1", "block2"]
        assert all(float(row[4]) >= 0.0 and row[5].endswith("%") for row in outline.rows)
        assert "for a batch of 4 on this machine" in outline.note
