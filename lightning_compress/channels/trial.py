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
from lightning_compress.channels.reference import dense_without
from lightning_compress.channels.removal import take
from lightning_compress.channels.reshapes import Solving, attributes_needed, is_reshape
from lightning_compress.channels.sandbox import sandbox
from lightning_compress.channels.slicing import Slices
from lightning_compress.core.evaluation import entries_restored, set_mode
from lightning_compress.core.outputs import TOLERANCE, compare, run
from lightning_compress.core.side_outputs import side_outputs

ErrorOf = Callable[[Sequence[ChannelGroup]], str | None]
Follower = Callable[[ChannelGroup], ChannelGroup]


class Trial:
    """Cuts candidates of a plan, inside a sandbox, and compares with the dense network without those channels."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model, self._plan, self._inputs = model, plan, plan.inputs
        self._calls: Calls | None = None

    def survivors(self) -> list[ChannelGroup]:
        """The groups that may be cut, in any combination, and the frozen ones that say why not."""
        free = [group for group in self._plan.candidates if group.frozen is None]
        frozen = [group for group in self._plan.candidates if group.frozen is not None]
        chosen = _compatible(free)
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

        return sorted(chosen + _telling(frozen, chosen), key=position)

    def _sorted_out(self, free: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
        """The free groups that survive together, and the others; each way costs more forward passes than the last.

        Groups of one kind are like blocks: the first represents all of them, until they do not survive together.
        """
        stuck: set[tuple[object, ...]] = set()
        for trial in (self._first_tried, partial(self._tried, error_of=self._crash)):
            chosen, frozen = self._told_apart([group for kind in _kinds(free) for group in trial(kind)])
            if self._error(chosen) is None:
                return chosen, frozen
            stuck = {identity(group) for group in frozen}
        left = [group for group in free if identity(group) not in stuck]
        tried, more = self._told_apart([group for kind in _kinds(left) for group in self._tried(kind, self._error)])
        frozen += more
        chosen, more = self._together([], tried)
        return chosen, frozen + more

    def _told_apart(self, tried: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
        """Of groups that were tried, those that can be cut in any combination, and the frozen ones.

        Where a module reshapes keys and values alike, and only the keys' width leaves without them, half of the heads
        leaves as many values as half of the width would: a reshape can't tell which of the two has left.
        """
        chosen = _compatible([group for group in tried if group.frozen is None])
        frozen = [group for group in tried if group.frozen is not None]
        noting: dict[str, list[ChannelGroup]] = {}
        for group in chosen:
            for module in dict.fromkeys(one.module for one in group.attributes if is_reshape(one.name)):
                noting.setdefault(module, []).append(group)
        errors: dict[tuple[object, ...], str | None] = {}  # by kinds: the first pair represents the others of its kind
        stuck: dict[int, str] = {}
        for pair in (pair for groups in noting.values() for pair in combinations(groups, 2)):
            share, kinds = math.gcd(*(group.size for group in pair)), tuple(map(_kind, pair))
            if share > 1 and kinds not in errors:
                errors[kinds] = self._parts.crash([(group, torch.arange(group.size // share)) for group in pair])
            if errors.get(kinds) is not None:
                fewer = min(pair, key=lambda group: len(group.members))
                stuck[id(fewer)] = f"a reshape in the network's code can't tell it from other groups: {errors[kinds]}"
        frozen += [replace(group, frozen=stuck[id(group)]) for group in chosen if id(group) in stuck]
        return [group for group in chosen if id(group) not in stuck], frozen

    def _first_tried(self, kind: list[ChannelGroup]) -> list[ChannelGroup]:
        """Free or freeze groups as the first of them does around its own modules, by what comes out of these if it can.

        Modules may return what nobody reads, so that a difference there says less than a crash.
        """
        for error_of in (self._difference, self._crash) if kind[0].exact else (self._crash,):
            groups = self._tried(kind, partial(_of_first, error_of), alike=True)
            if groups[0].frozen is None:
                break
        return groups

    def _tried(self, kind: list[ChannelGroup], error_of: ErrorOf, *, alike: bool = False) -> list[ChannelGroup]:
        """Free or freeze the groups of one kind, with what follows them in their modules where the code needs it.

        Where nothing helps the first of them, the others are frozen with it if they are `alike`.
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
        """What adds to a group the numbers of its modules, or the sizes of their reshapes, that must follow it."""
        variants = {_numbers(with_attributes(first, self._model, names)): names for names in reversed(VARIANTS)}
        for names in reversed(variants.values()):
            yield partial(with_attributes, model=self._model, names=names)
        for names in reversed(variants.values()):
            yield partial(self._with_reshapes, names=names)

    def _with_reshapes(self, group: ChannelGroup, names: Sequence[str]) -> ChannelGroup:
        """Add the numbers of those names, and the reshapes that ask for more than is there without half the group."""
        group = with_attributes(group, self._model, names)
        units = torch.arange(group.size // 2)
        removed = self._plan.removed([(group, units)])[min(self._plan.axis_orders[identity(group)])]
        solving = Solving(self._model, self._plan.reshapes(group), removed)
        with solving.watching():
            self._parts.crash([(group, units)])
        found = attributes_needed(solving.needed, self._plan.unit_of(group), group.size)
        return replace(group, attributes=(*group.attributes, *found)) if found else group

    def _halves_move(self, groups: Sequence[ChannelGroup]) -> bool:
        """Whether slice boundaries still fall at the same fractions after a cut, which outputs may not show."""
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
        """The free groups with those others that survive together with them, and the rest, by halves."""
        error = self._error([*free, *groups]) if groups else None
        if error is None:
            return [*free, *groups], []
        if len(groups) == 1:
            return free, [replace(groups[0], frozen=f"the network's code does not survive a cut with others: {error}")]
        free, frozen = self._together(free, groups[: len(groups) // 2])
        free, more = self._together(free, groups[len(groups) // 2 :])
        return free, frozen + more

    def _error(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Cut all groups, several times, and compare; return None, or a description of the error."""
        drops = _drops(groups)
        for drop in drops:
            error = self.compared(drop)
            if error is not None:
                return error
        if self._plan.trains_alike:
            return None
        set_mode(self._model, True)
        try:
            error = self.compared([(group, units) for group, units in drops[0] if group.exact])
        finally:
            set_mode(self._model, False)
        return error and f"in training mode {error}"

    @property
    def _parts(self) -> Calls:
        self._calls = self._calls or Calls(self._model, self._inputs)
        return self._calls

    def _crash(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Cut one group after the other, by a single unit; return None, or the first error of the code around it."""
        drops = ([(group, torch.arange(1))] for group in groups)
        return next(filter(None, map(self._parts.crash, drops)), None)

    def _difference(self, groups: Sequence[ChannelGroup]) -> str | None:
        """The same for exact groups, where what comes out of the modules around them must be that of zeros, too."""
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
        except Exception as error:  # the reference can't say what should come out: nothing is free without it
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
    """The numbers that follow a group."""
    return frozenset((one.module, one.name, one.place) for one in group.attributes)


def _of_first(error_of: ErrorOf, groups: Sequence[ChannelGroup]) -> str | None:
    return error_of(groups[:1])


def _drops(groups: Sequence[ChannelGroup]) -> list[list[tuple[ChannelGroup, Tensor]]]:
    """Return the trial cuts: every group in two sizes, so that a fixed number in the network's code fails in one.

    One unit of every group comes first, because little hides behind channels that are gone. Rows leave without columns,
    too, and columns without rows: together they may leave a number of channels that fits by chance.
    """
    generator = torch.Generator().manual_seed(0)

    def some(group: ChannelGroup, count: int) -> tuple[ChannelGroup, Tensor]:
        return group, torch.randperm(group.size, generator=generator)[:count]

    sides: list[list[ChannelGroup]] = []
    for group in groups:
        side = next((side for side in sides if not any(_overlap(group, other) for other in side)), None)
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


def _overlap(a: ChannelGroup, b: ChannelGroup) -> bool:
    others = {(one.tensor, one.dim): one.index for one in b.members}
    return any(
        bool(torch.isin(one.index, others[one.tensor, one.dim]).any())
        for one in a.members
        if (one.tensor, one.dim) in others
    )


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


# ---------------------------------------------------------------------- candidates


def _compatible(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return those of overlapping groups that can be cut in any combination, finer ones first."""
    chosen: list[ChannelGroup] = []
    for group in sorted(groups, key=lambda one: -one.size):
        if all(_crosses(group, other) for other in chosen):
            chosen.append(group)
    return chosen


def _crosses(a: ChannelGroup, b: ChannelGroup) -> bool:
    """Whether two groups are disjoint, or as rows are to columns."""
    others = {(one.tensor, one.dim): one for one in b.members}
    for one in a.members:
        other = others.get((one.tensor, one.dim))
        if other is None:
            continue
        size = int(max(one.index.max(), other.index.max())) + 1
        row, column = torch.full((size,), -1), torch.full((size,), -1)
        row[one.index] = torch.arange(a.size)[:, None].expand_as(one.index)
        column[other.index] = torch.arange(b.size)[:, None].expand_as(other.index)
        if not bool(((row >= 0) & (column >= 0)).any()):
            continue
        if not torch.equal(row >= 0, column >= 0):
            return False
        both = (row * b.size + column)[row >= 0].bincount(minlength=a.size * b.size)
        if int(both.min()) == 0 or int(both.min()) != int(both.max()):
            return False
    return True


def _telling(frozen: Sequence[ChannelGroup], free: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return the frozen groups that cover slices which no other group covers, larger ones first."""
    told: list[ChannelGroup] = []
    said = {place for group in free for place in _made(group)}
    for group in sorted(frozen, key=lambda one: -one.size):
        if not _made(group) <= said:
            told.append(group)
            said |= _made(group)
    return told


def _made(group: ChannelGroup) -> set[tuple[str, int, int]]:
    """Every position that a group's producing slices cover."""
    makers = (one for one in group.members if one.produces)
    return {(one.tensor, one.dim, at) for one in makers for at in one.index.reshape(-1).tolist()}


def _kinds(groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups that look alike: the same tensors of the same shapes, at other places in the network."""
    kinds: dict[tuple[object, ...], list[ChannelGroup]] = {}
    for group in groups:
        kinds.setdefault(_kind(group), []).append(group)
    return list(kinds.values())


def _kind(group: ChannelGroup) -> tuple[object, ...]:
    slices = (("".join(x for x in one.tensor if not x.isdigit()), one.dim, one.index.shape) for one in group.members)
    return group.size, *slices
