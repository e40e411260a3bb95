"""The residual blocks of a network, found in its graph and proved by running it."""

from __future__ import annotations

from torch import nn

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.stages.block import Block, FoundBlocks, chosen_blocks

__all__ = ["Block", "FoundBlocks", "chosen_blocks", "find_blocks"]


def find_blocks(network: nn.Module, example_inputs: ExampleInputs, *, output: str | int | None = None) -> FoundBlocks:
    """Return the residual blocks of a network."""
    raise NotImplementedError
