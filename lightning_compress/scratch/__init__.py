"""The structure of a pruned network with new random weights, to see what its weights were worth."""

from lightning_compress.scratch.structure import (
    Mask,
    masks_of,
    new_weights,
    random_masks,
    read_structure,
)

__all__ = ["Mask", "masks_of", "new_weights", "random_masks", "read_structure"]
