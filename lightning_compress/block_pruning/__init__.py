"""Static depth: residual blocks with the least importance leave a network for good."""

from lightning_compress.block_pruning.influence import block_influence
from lightning_compress.block_pruning.prune import prune_blocks, removed_blocks

__all__ = ["block_influence", "prune_blocks", "removed_blocks"]
