"""A residual block of a network, and the choice among those that were found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal


@dataclass(frozen=True)
class Block:
    """A residual sum s = x + F(x). Skipping it makes s = x: the shortcut x stays, the branch F leaves.

    Attributes:
        name: The deepest module that runs all of the branch's multiply-accumulates; of two with one name, the second
            has ":2" behind it.
        kind: "identity": the shortcut is x itself. "projection": it has multiply-accumulates of its own, which stay.
        reads: Qualified name of a module whose first tensor argument is x.
        ends: Qualified name of a module whose output, multiplied by a factor per sample, multiplies the branch.
        modules: The maximal modules that run in the branch alone, in the order in which they run.
        macs: Multiply-accumulates of the branch, for one sample.
    """

    name: str
    kind: Literal["identity", "projection"]
    reads: str
    ends: str
    modules: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class FoundBlocks:
    """The blocks of a network.

    Attributes:
        candidates: All of them, in the order in which they run.
        macs: Multiply-accumulates of the network, for one sample.
        refused: Why a sum is none of `blocks`, by the name of its branch.
    """

    candidates: tuple[Block, ...]
    macs: int
    refused: Mapping[str, str]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The innermost ones whose shortcut is an identity."""
        return tuple(block for block in self.candidates if block.name not in self.refused)

    @property
    def others(self) -> tuple[Block, ...]:
        """Those that are taken only when they are named: projections, and blocks around blocks."""
        return tuple(block for block in self.candidates if block.name in self.refused)


def chosen_blocks(found: FoundBlocks, names: str | Sequence[str] | None) -> tuple[Block, ...]:
    """Return the blocks with these names, in the order in which they run; None: all whose shortcut is an identity.

    Args:
        found: What `find_blocks` returned.
        names: Names of blocks, or glob patterns, or one of them.

    Raises:
        ValueError: A name fits no block, two of the blocks overlap, or there is no block at all.

    Example:
        >>> one = Block("layer.0", "identity", "layer.0.conv", "layer.0.norm", ("layer.0",), 100)
        >>> chosen_blocks(FoundBlocks((one,), 200, {}), ["layer.*"]) == (one,)
        True
    """
    if names is None:
        if not found.blocks:
            why = "; ".join(f"{name}: {reason}" for name, reason in found.refused.items())
            raise ValueError(
                f"The network has no residual block whose shortcut is an identity. {why or 'It has no residual sum'}."
                + (" Blocks with a reason that allows it are taken when they are named." if found.others else "")
            )
        return found.blocks
    names = [names] if isinstance(names, str) else names
    known = {block.name: block for block in found.candidates}
    chosen: dict[str, Block] = {}
    for name in names:
        fits = [one for one in known if one == name or fnmatchcase(one, name)]
        if not fits:
            reason = f", because {found.refused[name]}" if name in found.refused else ""
            raise ValueError(f"There is no block {name!r}{reason}: pass names of {', '.join(known) or 'none'}.")
        chosen |= {one: known[one] for one in fits}
    if not chosen:
        raise ValueError("blocks is empty: pass names of blocks, or None for all of them.")
    blocks = tuple(block for name, block in known.items() if name in chosen)
    for one in blocks:
        for other in blocks:
            inside = [name for name in one.modules if any(_within(name, outer) for outer in other.modules)]
            if one is not other and inside:
                raise ValueError(f"The blocks {one.name!r} and {other.name!r} overlap in {inside[0]!r}: name one.")
    return blocks


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
