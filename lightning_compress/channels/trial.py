"""Trial cuts: a group is free only after the network's own code has run without half of its channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_compress.channels.attributes import VARIANTS, with_attributes
from lightning_compress.channels.candidates import Plan, identity
from lightning_compress.channels.conditioning import with_factors
from lightning_compress.channels.factors import without_factors
from lightning_compress.channels.graph.walk import export
from lightning_compress.channels.groups import ChannelGroup, Drop
from lightning_compress.channels.module_calls import Calls, without
from lightning_compress.channels.overlaps import compatible, kind_of, kinds_of, needed_to_cover, overlap
from lightning_compress.channels.reference import dense_without
from lightning_compress.channels.removal import take
from lightning_compress.channels.reshape_trial import Solving, attributes_needed
from lightning_compress.channels.reshapes import is_reshape
from lightning_compress.channels.sandbox import sandbox
from lightning_compress.channels.slicing import Slices
from lightning_compress.core.evaluation import entries_restored, set_mode
from lightning_compress.core.outputs import TOLERANCE, compare, run
from lightning_compress.core.side_outputs import side_outputs

ErrorOf = Callable[[Sequence[ChannelGroup]], str | None]
Follower = Callable[[ChannelGroup], ChannelGroup]


class Trial:
    """Cuts candidates of a plan in the sandbox, and compares the thin network with the dense one."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model, self._plan, self._inputs = model, plan, plan.inputs
        self._calls: Calls | None = None

    def survivors(self) -> list[ChannelGroup]:
        """Return the groups that may be cut in any combination, and the frozen ones with their reasons."""
        free = [group for group in self._plan.candidates if group.frozen is None]
        frozen = [group for group in self._plan.candidates if group.frozen is not None]
        chosen = compatible(free)
        if self._error(chosen) is not None:
            chosen, more = self._sorted_out(free)
            frozen += more
        halved = [group for group in chosen if identity(group) in self._plan.halved]
        if halved and not self._halves_move(halved):
            chosen = [group for group in chosen if group not in halved]
            why = "its slices begin and end at places that the network's code names"
            frozen += [replace(group, frozen=why) for group in halved]
        chosen = without_factors(chosen, self._model, self._plan.places.parameters, self._error)
        order = {name: number for number, name in enumerate(self._plan.places.names)}

        def position(group: ChannelGroup) -> tuple[int, int, int]:
            return min((order[one.tensor], one.dim, int(one.index.min())) for one in group.members if one.produces)

        return sorted(chosen + needed_to_cover(frozen, chosen), key=position)

    def _sorted_out(self, free: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
        """Return the groups that survive a cut together, and the others.

        The first group of a kind represents the others, until the chosen groups do not survive together. Every further
        way of trying needs more forward passes.
        """
        stuck: set[tuple[object, ...]] = set()
        for trial in (self._first_tried, partial(self._tried, error_of=self._crash)):
            chosen, frozen = self._distinguished([group for kind in kinds_of(free) for group in trial(kind)])
            if self._error(chosen) is None:
                return chosen, frozen
            stuck = {identity(group) for group in frozen}
        left = [group for group in free if identity(group) not in stuck]
        tried, more = self._distinguished(
            [group for kind in kinds_of(left) for group in self._tried(kind, self._error)]
        )
        frozen += more
        chosen, more = self._together([], tried)
        return chosen, frozen + more

    def _distinguished(self, tried: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
        """Return the groups that can be cut in any combination, and the frozen ones, of groups that were tried alone.

        A module may reshape keys and values in the same way, where a channel of the keys' width has no values. After a
        cut of half of the heads the values are as many as half of the width would be, so that a reshape cannot
        distinguish the two cuts. Of such a pair the group with fewer members is frozen.
        """
        chosen = compatible([group for group in tried if group.frozen is None])
        frozen = [group for group in tried if group.frozen is not None]
        noting: dict[str, list[ChannelGroup]] = {}
        for group in chosen:
            for module in dict.fromkeys(one.module for one in group.attributes if is_reshape(one.name)):
                noting.setdefault(module, []).append(group)
        errors: dict[tuple[object, ...], str | None] = {}  # by kinds, of which the first pair represents the others
        stuck: dict[int, str] = {}
        for pair in (pair for groups in noting.values() for pair in combinations(groups, 2)):
            share, kinds = math.gcd(*(group.size for group in pair)), tuple(map(kind_of, pair))
            if share > 1 and kinds not in errors:
                errors[kinds] = self._parts.crash([(group, torch.arange(group.size // share)) for group in pair])
            if errors.get(kinds) is not None:
                fewer = min(pair, key=lambda group: len(group.members))
                stuck[id(fewer)] = (
                    f"a reshape in the network's code cannot distinguish it from other groups: {errors[kinds]}"
                )
        frozen += [replace(group, frozen=stuck[id(group)]) for group in chosen if id(group) in stuck]
        return [group for group in chosen if id(group) not in stuck], frozen

    def _first_tried(self, kind: list[ChannelGroup]) -> list[ChannelGroup]:
        """Free or freeze all groups of a kind by a trial of the first group in the smallest module around it.

        If the module's output differs, a crash alone decides, because the network may not read the difference.
        """
        for error_of in (self._difference, self._crash) if kind[0].exact else (self._crash,):
            groups = self._tried(kind, partial(_of_first, error_of), alike=True)
            if groups[0].frozen is None:
                break
        return groups

    def _tried(self, kind: list[ChannelGroup], error_of: ErrorOf, *, alike: bool = False) -> list[ChannelGroup]:
        """Free or freeze the groups of one kind; free groups get the attributes of modules that the code needs changed.

        Where no attributes help the first group, the others are frozen with it if they are `alike`.
        """
        if not kind:
            return []
        error = error_of(kind)
        if error is None:
            return kind
        known = [_numbers(kind[0])]
        for follow in self._followers(kind[0]):
            first = follow(kind[0])
            if _numbers(first) in known:
                continue
            known.append(_numbers(first))
            if error_of([first]) is not None:
                continue
            groups = [first, *map(follow, kind[1:])]
            if len(kind) == 1 or error_of(groups) is None:
                return groups
            break
        else:
            if len(kind) == 1 or error_of(kind[:1]) is not None:
                stuck = len(kind) if alike else 1
                why = f"the network's code does not survive a cut: {error if alike else error_of(kind[:1])}"
                return [replace(group, frozen=why) for group in kind[:stuck]] + self._tried(kind[stuck:], error_of)
        middle = len(kind) // 2
        return self._tried(kind[:middle], error_of) + self._tried(kind[middle:], error_of)

    def _followers(self, first: ChannelGroup) -> Iterator[Follower]:
        """Return functions that add attributes to a group: numbers of its modules, then sizes of their reshapes."""
        variants = {_numbers(with_attributes(first, self._model, names)): names for names in reversed(VARIANTS)}
        for names in reversed(variants.values()):
            yield partial(with_attributes, model=self._model, names=names)
        for names in reversed(variants.values()):
            yield partial(self._with_reshapes, names=names)

    def _with_reshapes(self, group: ChannelGroup, names: Sequence[str]) -> ChannelGroup:
        """Add the numbers of some names, and the reshapes that ask for more than half of the group leaves."""
        group = with_attributes(group, self._model, names)
        channels = torch.arange(group.size // 2)
        removed = self._plan.removed([(group, channels)])[min(self._plan.axis_orders[identity(group)])]
        solving = Solving(self._model, self._plan.reshapes(group), removed)
        with solving.watching():
            self._parts.crash([(group, channels)])
        found = attributes_needed(solving.needed, self._plan.channel_of(group), group.size)
        return replace(group, attributes=(*group.attributes, *found)) if found else group

    def _halves_move(self, groups: Sequence[ChannelGroup]) -> bool:
        """Return whether slices begin and end at the same fractions after a cut, which outputs may not show."""
        slices = Slices(sparing=True)
        try:
            take(slices, self._model, [(group, torch.arange(max(1, group.size // 2))) for group in groups])
            with entries_restored(self._model):
                program = export(self._model, self._inputs)
            return _slices(program) == _slices(self._plan.program)
        except ValueError:
            return False
        finally:
            slices.undo()

    def _together(
        self, free: list[ChannelGroup], groups: Sequence[ChannelGroup]
    ) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
        """Add to the free groups those of `groups` that survive a cut with them; return both, and the frozen rest."""
        error = self._error([*free, *groups]) if groups else None
        if error is None:
            return [*free, *groups], []
        if len(groups) == 1:
            return free, [replace(groups[0], frozen=f"the network's code does not survive a cut with others: {error}")]
        free, frozen = self._together(free, groups[: len(groups) // 2])
        free, more = self._together(free, groups[len(groups) // 2 :])
        return free, frozen + more

    def _error(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Cut all groups, several times, and compare; return the first error, or None."""
        drops = _drops(groups)
        for drop in drops:
            error = self.compared(drop)
            if error is not None:
                return error
        if self._plan.trains_alike:
            return None
        set_mode(self._model, True)
        try:
            error = self.compared([(group, channels) for group, channels in drops[0] if group.exact])
        finally:
            set_mode(self._model, False)
        return error and f"in training mode {error}"

    @property
    def _parts(self) -> Calls:
        self._calls = self._calls or Calls(self._model, self._inputs)
        return self._calls

    def _crash(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Cut one channel out of each group in turn, and call the module around it; return the first error, or None."""
        drops = ([(group, torch.arange(1))] for group in groups)
        return next(filter(None, map(self._parts.crash, drops)), None)

    def _difference(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Cut half of each exact group in turn; return the first error or difference around it, or None."""
        drops = ([(group, torch.arange(group.size // 2))] for group in groups)
        return next(filter(None, map(self._parts.difference, drops)), None)

    def compared(self, drop: Drop) -> str | None:
        """Return where the thin network differs from the dense one without those channels; None if it does not."""
        # The thin network runs first: most code that does not survive a cut raises an error early.
        got = without(self._model, drop, lambda: run(self._model, self._inputs))
        if isinstance(got, str):
            return got
        try:
            expected = dense_without(self._model, self._inputs, drop, self._plan)
        except Exception as error:  # no group is free without the reference
            return f"there is nothing to compare with ({error})"[:200]
        return compare(got, expected, TOLERANCE)


class PlanChecker:
    """Tries a cut of the network that was planned, in the sandbox."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def difference(self, model: nn.Module, drop: Drop) -> str | None:
        """Return where the thin network differs from the dense one without those channels; None if it does not."""
        with side_outputs(model), sandbox(model):
            with_factors(model, self.plan.factors)
            return Trial(model, self.plan).compared(drop)


def _numbers(group: ChannelGroup) -> frozenset[tuple[str, str, int | None]]:
    """Return what identifies the attributes of a group."""
    return frozenset((one.module, one.name, one.place) for one in group.attributes)


def _of_first(error_of: ErrorOf, groups: Sequence[ChannelGroup]) -> str | None:
    return error_of(groups[:1])


def _drops(groups: Sequence[ChannelGroup]) -> list[list[tuple[ChannelGroup, Tensor]]]:
    """Return the trial cuts: every group in two sizes, of which a fixed number in the network's code fits one at most.

    The first cut takes one channel of every group, because most errors show while most channels are there. Where groups
    are rows and columns of the same positions, each side is also cut alone: both together may leave a number of
    positions that fits by chance.
    """
    generator = torch.Generator().manual_seed(0)

    def some(group: ChannelGroup, count: int) -> tuple[ChannelGroup, Tensor]:
        return group, torch.randperm(group.size, generator=generator)[:count]

    sides: list[list[ChannelGroup]] = []
    for group in groups:
        side = next((side for side in sides if not any(overlap(group, other) for other in side)), None)
        if side is None:
            sides.append([group])
        else:
            side.append(group)
    few = [some(group, 1) for group in groups]
    many = [
        some(group, group.size - 1 if number % 2 else group.size - group.size // 2)
        for number, group in enumerate(groups)
    ]
    return [few, many, *([some(group, group.size - group.size // 2) for group in side] for side in sides[1:] and sides)]


def _slices(program: ExportedProgram) -> list[tuple[Fraction, Fraction]]:
    """Return where slices begin and end, as fractions of the sliced size."""
    found = []
    for node in program.graph.nodes:
        if str(node.target).startswith("aten.slice."):
            source, dim, start, end = (*node.args, *(0, None, None)[len(node.args) - 1 :])[:4]
            size = source.meta["val"].shape[dim]
            places = (0 if at is None else max(0, at + size if at < 0 else min(at, size)) for at in (start, end))
            first, last = places
            found.append((Fraction(first, size), Fraction(size if end is None else last, size)))
    return found
