"""Channel groups: slices of tensors that must leave a network together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

SINGLE = "it has a single channel"


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one tensor that belong to the channels of a group.

    Attributes:
        tensor: Qualified name of a parameter or buffer, such as `"conv.weight"`.
        dim: The dimension that is cut.
        index: Shape (size, k): row i holds the k positions along `dim` that belong to channel i.
        produces: Whether the slice makes the channel's value (a weight's output side, a bias, a norm's scale and
            shift). A channel is zero when all slices that produce it are; the other slices read or count the channel.
    """

    tensor: str
    dim: int
    index: Tensor
    produces: bool = True


@dataclass(frozen=True, eq=False)
class Attribute:
    """A number that a module's code reads and that counts channels.

    Attributes:
        module: Path of the module.
        name: Name of the attribute.
        place: Position in a tuple, or None for a plain number.
        index: Shape (size, k): row i holds the k positions that belong to channel i among those that the number counts.
    """

    module: str
    name: str
    place: int | None
    index: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of which any non-empty subset may stay.

    Attributes:
        name: Unique name: the module, or bare parameter, that makes the channels.
        size: Number of channels. A whole attention head counts as one channel where its parts cannot leave alone.
        members: The slices of all tensors that belong to the channels.
        attributes: Numbers of modules that a cut changes.
        exact: Whether cutting channels equals zeroing everything that produces them.
        frozen: None, or the reason why nothing may be cut.
        note: None, or the reason why the group is not exact.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    attributes: tuple[Attribute, ...] = ()
    exact: bool = True
    frozen: str | None = None
    note: str | None = None

    @property
    def modules(self) -> list[str]:
        """The paths of the modules whose tensors are cut."""
        return list(dict.fromkeys(member.tensor.rpartition(".")[0] for member in self.members))


Drop = Sequence[tuple[ChannelGroup, Tensor]]  # groups with the channels that leave


class Checker(Protocol):
    """Tries a cut on a copy of the weights, in double precision; it knows the dense network that was planned."""

    def difference(self, model: nn.Module, drop: Drop) -> str | None:
        """Return where the thin network and the dense one without those channels differ, or None."""


class ChannelGroups(list[ChannelGroup]):
    """Channel groups that print as a table.

    Attributes:
        checker: Tries a cut before it is made. Groups that `prefixed`, `copied` or `thinned` returned have none, since
            they are not those of the network that was planned: then only exact groups can be cut, and the network's
            output for the example inputs is the only check.
    """

    checker: Checker | None = None

    def prefixed(self, prefix: str) -> ChannelGroups:
        """Return the groups for a module that has the network as its child `prefix`, without a checker.

        An empty prefix stands for the network itself.
        """
        start = f"{prefix}." if prefix else ""
        return ChannelGroups(
            replace(
                group,
                name=start + group.name,
                members=tuple(replace(one, tensor=start + one.tensor) for one in group.members),
                attributes=tuple(replace(one, module=(start + one.module).rstrip(".")) for one in group.attributes),
            )
            for group in self
        )

    def copied(self, names: Mapping[str, str], originals: ChannelGroups) -> ChannelGroups:
        """Return the groups with the slices of a copy of the network added, where one module holds both.

        Args:
            names: Names of the copy's tensors and modules in that module, by their names in the network.
            originals: The groups by the names of the network.
        """
        return ChannelGroups(
            replace(
                group,
                members=group.members
                + tuple(
                    replace(one, tensor=names[one.tensor], produces=False)
                    for one in original.members
                    if one.tensor in names
                ),
                attributes=group.attributes
                + tuple(replace(one, module=names[one.module]) for one in original.attributes if one.module in names),
            )
            for group, original in zip(self, originals, strict=True)
        )

    def free(self, *, inexact: bool = False) -> list[ChannelGroup]:
        """Return the groups that may be cut exactly, and those that may be cut inexactly if asked for."""
        return [group for group in self if group.frozen is None and (group.exact or inexact)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("group", "channels", "tensors", "may be cut")
        for group in self:
            cut = group.frozen or ("yes" if group.exact else f"only inexactly: {group.note}")
            table.add_row(group.name, str(group.size), str(len(group.members)), cut)
        yield table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def to_json(self) -> str:
        """Return everything that is known about the groups, as JSON."""
        return json.dumps(
            [
                {
                    "name": group.name,
                    "size": group.size,
                    "exact": group.exact,
                    "note": group.note,
                    "frozen": group.frozen,
                    "modules": group.modules,
                    "members": [
                        {"tensor": one.tensor, "dim": one.dim, "produces": one.produces, "index": one.index.tolist()}
                        for one in group.members
                    ],
                    "attributes": [
                        {"module": one.module, "name": one.name, "place": one.place, "index": one.index.tolist()}
                        for one in group.attributes
                    ],
                }
                for group in self
            ],
            indent=1,
        )


def thinned(groups: ChannelGroups, keep: Mapping[str, Tensor]) -> ChannelGroups:
    """Return the groups after a cut: with fewer channels, at the positions of the thin tensors, without a checker.

    Args:
        groups: The groups before the cut.
        keep: By group name a mask of the channels that stay. A group without a mask stays whole.

    Example:
        >>> def group(name, *rows):
        ...     return ChannelGroup(name, len(rows), (Member("w", 0, torch.tensor(rows)),))
        >>> both = ChannelGroups([group("a", [0], [1]), group("b", [2], [3])])
        >>> [one.members[0].index.tolist() for one in thinned(both, {"a": torch.tensor([False, True])})]
        [[[0]], [[1], [2]]]
        >>> thinned(both, {"a": torch.tensor([False, True])})[0].frozen
        'it has a single channel'
    """
    leaves = _leaving(groups, keep)
    # by axis the new position of every old one, -1 where it has left
    after = {axis: ((~gone).cumsum(0) - 1).masked_fill(gone, -1) for axis, gone in leaves.items()}
    found = ChannelGroups()
    for group in groups:
        kept = keep.get(group.name, torch.ones(group.size, dtype=torch.bool))
        moved = [_without_gone(after[axis][index[kept]]) for axis, index in _axes(group)]
        indices = [index for index in moved if index is not None]
        if len(indices) < len(moved):
            continue  # another group cuts unequal numbers of positions out of the slices of this frozen one
        n = len(group.members)
        members = tuple(replace(one, index=index) for one, index in zip(group.members, indices[:n], strict=True))
        attributes = tuple(replace(one, index=index) for one, index in zip(group.attributes, indices[n:], strict=True))
        size = int(kept.sum())
        frozen = group.frozen or (SINGLE if size == 1 else None)
        found.append(replace(group, size=size, members=members, attributes=attributes, frozen=frozen))
    return found


def positions_kept(
    groups: ChannelGroups, keep: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, dict[int, Tensor]]:
    """Return the positions that stay in a cut, by name and dimension of every tensor that the cut slices.

    Args:
        groups: The groups before the cut.
        keep: As for `thinned`.
        tensors: The network's tensors before the cut, by name.

    Example:
        >>> group = ChannelGroup("a", 2, (Member("w", 0, torch.tensor([[0, 1], [2, 3]])),))
        >>> positions_kept(ChannelGroups([group]), {"a": torch.tensor([True, False])}, {"w": torch.zeros(5, 3)})
        {'w': {0: tensor([0, 1, 4])}}
    """
    kept: dict[str, dict[int, Tensor]] = {}
    leaves = _leaving(groups, keep)
    for name, dim in dict.fromkeys((one.tensor, one.dim) for group in groups for one in group.members):
        gone = leaves[name, dim]
        if bool(gone.any()):
            stay = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            stay[: len(gone)] = ~gone
            kept.setdefault(name, {})[dim] = stay.nonzero().squeeze(1)
    return kept


def _leaving(groups: ChannelGroups, keep: Mapping[str, Tensor]) -> dict[tuple[object, ...], Tensor]:
    """Return by axis a mask of the positions that leave, up to the last position that a group has."""
    leaves: dict[tuple[object, ...], Tensor] = {}
    for group in groups:
        for axis, index in _axes(group):
            gone = leaves.setdefault(axis, torch.zeros(0, dtype=torch.bool))
            missing = int(index.max()) + 1 - len(gone)
            leaves[axis] = gone = torch.cat([gone, torch.zeros(max(0, missing), dtype=torch.bool)])
            if group.name in keep:
                gone[index[~keep[group.name]].reshape(-1)] = True
    return leaves


def _without_gone(positions: Tensor) -> Tensor | None:
    """Return the rows without their entries -1; None if the rows would be empty or of unequal lengths."""
    counts = (positions >= 0).sum(1)
    if len(counts) == 0 or int(counts.min()) == 0 or int(counts.min()) != int(counts.max()):
        return None
    return positions[positions >= 0].reshape(len(positions), -1)


def _axes(group: ChannelGroup) -> list[tuple[tuple[object, ...], Tensor]]:
    """Return the axes of a group, dimensions of tensors and numbers of modules, with the positions along them."""
    members = [((one.tensor, one.dim), one.index) for one in group.members]
    return [*members, *(((one.module, one.name, one.place), one.index) for one in group.attributes)]
