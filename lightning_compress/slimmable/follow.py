"""How the network of a width follows the full network: its tensors, modes, numbers and children."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.tensors import memory_format
from lightning_compress.slimmable.skeleton import is_shared

TABLES = ("_parameters", "_buffers")
_VERSION = attrgetter("_version")
_MODELESS = (
    *(nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.PReLU),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict),
)  # of torch, and the same in training and in evaluation
_PLAIN = (bool, int, float, str, type(None))
Cuts = tuple[tuple[int, slice | Tensor], ...]  # by dimension the positions that stay


class Slot:
    """A tensor of the skeleton, and where it comes from.

    Attributes:
        table: Of the network, or of the norms of a width.
        name: In both tables.
        target: The skeleton's table.
        cuts: What of the tensor the skeleton has.
        gathers: Whether that is a copy, when no gradients are wanted.
        value: What the skeleton has now.
    """

    def __init__(
        self, table: dict[str, Any], name: str, target: dict[str, Any], cuts: Cuts, *, contiguous: bool
    ) -> None:
        self.table, self.name, self.target, self.cuts = table, name, target, cuts
        self.gathers = any(isinstance(cut, Tensor) or (contiguous and (dim, cut.step) != (0, 1)) for dim, cut in cuts)
        self.value: Any = None

    def take(self, taken: dict[int, Tensor], *, gradients: bool) -> None:
        """Put the present slice into the skeleton; `taken` has it already if the tensor has another name."""
        source = self.table[self.name]
        if not self.cuts:
            self.value = self.target[self.name] = source
            return
        if id(source) not in taken:
            found = _cut(source if gradients else source.detach(), self.cuts)
            if self.gathers and not gradients:
                with torch.inference_mode(False):  # a copy may be used in training later
                    found = found.contiguous(memory_format=memory_format(source))
            taken[id(source)] = found
        self.value = self.target[self.name] = taken[id(source)]


class Pair:
    """A module of the network, and its copy, which follows its numbers, strings, and whatever both share.

    Attributes:
        module: Of the network.
        names: Those of the attributes that are followed; "training" is the first.
    """

    def __init__(self, module: nn.Module, copied: nn.Module) -> None:
        self.module, self._kind, self._own = module, type(module), vars(copied)
        self._children = list(module._modules.values())
        alike = {
            name
            for name, value in vars(module).items()
            if _followed(value) and name in self._own and (self._own[name] is value or self._own[name] == value)
        }
        self.names = ("training", *sorted({*alike, "_is_full_backward_hook"} - {"training"}))
        self._seen: dict[str, Any] = {}

    def follow(self) -> None:
        """Take what has changed in the module.

        Raises:
            KeyError: It has other children, is of another class, or has lost an attribute: it needs another copy.
        """
        module, entries = self.module, vars(self.module)
        if type(module) is not self._kind or list(module._modules.values()) != self._children:
            raise KeyError
        now = {name: entries[name] for name in self.names}
        for name, value in now.items():
            if (name not in self._seen or self._seen[name] is not value) and _followed(value):
                self._own[name] = value
        self._seen = now


def _followed(value: Any) -> bool:
    return type(value) in _PLAIN or is_shared(value)


class Watch:
    """Sees whether a network is still what it was, in loops that run in C."""

    def __init__(self, pairs: Sequence[Pair], slots: Sequence[Slot]) -> None:
        modules = [pair.module for pair in pairs]
        watched: list[tuple[dict[str, Any], str]] = [(slot.table, slot.name) for slot in slots]
        watched += [(one._modules, name) for one in modules for name in one._modules]
        for pair in pairs:
            of_torch = type(pair.module).__module__.startswith("torch.")
            names = (
                () if isinstance(pair.module, _MODELESS) and of_torch else pair.names[:1] if of_torch else pair.names
            )
            watched += [(vars(pair.module), name) for name in names]
        self._tables, self._names = [table for table, _ in watched], [name for _, name in watched]
        self._values = [table[name] for table, name in watched]
        self._parents = [one._modules for one in modules if one._modules]
        self._lengths = list(map(len, self._parents))
        self._cut = [slot.table[slot.name] for slot in slots if slot.cuts]
        self._copied = [slot.table[slot.name] for slot in slots if slot.gathers]
        try:
            self._places, self._versions = self._now()
        except RuntimeError:  # tensors of torch.func have no place, and those of the inference mode no version
            self._places, self._versions = [-1], [-1]

    def _now(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self._cut)), list(map(_VERSION, self._copied))

    def same(self) -> bool:
        """Return whether modules, tensors and modes are the same, and copied tensors hold the same numbers."""
        try:
            return (
                all(map(is_, map(getitem, self._tables, self._names), self._values))
                and list(map(len, self._parents)) == self._lengths
                and (self._places, self._versions) == self._now()
            )
        except (KeyError, RuntimeError):
            return False


def slots_of(
    module: nn.Module,
    copied: nn.Module,
    table: str,
    cuts: Mapping[int, Cuts],
    given: nn.Module | None,
    fixed: bool,
    *,
    contiguous: bool,
) -> list[Slot]:
    """Return the slots of one table of a module's tensors; none if the copy shares the table.

    Args:
        module: Of the network.
        copied: Of the skeleton.
        table: The table's name.
        cuts: By id of a tensor of the network.
        given: Has tensors that take the place of the module's.
        fixed: Whether the copy counts its batches by itself.
        contiguous: As for `ThinNetwork`.
    """
    mine, theirs = vars(module)[table], {} if given is None else vars(given)[table]
    whole = mine if not theirs and all(id(tensor) not in cuts for tensor in mine.values()) else theirs
    if not fixed and whole.keys() == mine.keys():
        vars(copied)[table] = whole  # whatever it gets later, the copy has as well
        return []
    target = vars(copied)[table] = dict(vars(copied)[table])
    found = []
    for name, tensor in mine.items():
        if fixed and name == "num_batches_tracked":
            target[name] = None if tensor is None else torch.zeros_like(tensor)
        else:
            source = theirs if name in theirs else mine
            which = () if source is theirs else cuts.get(id(tensor), ())
            found.append(Slot(source, name, target, which, contiguous=contiguous))
    return found


def held_in(copies: Iterable[nn.Module], slots: Mapping[int, Slot]) -> Iterator[tuple[Any, Any, Slot]]:
    """Return the containers in modules that hold tensors of slots, with the key or position of each.

    Args:
        copies: The modules.
        slots: By id of the placeholder.

    Raises:
        ValueError: A tuple holds one.
    """
    for module in copies:
        left: list[Any] = [{name: one for name, one in vars(module).items() if name not in (*TABLES, "_modules")}]
        direct, seen = left[0], set()
        while left:
            container = left.pop()
            if id(container) in seen:
                continue
            seen.add(id(container))
            for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
                if id(value) in slots and isinstance(container, tuple):
                    raise ValueError(
                        f"A {type(module).__name__} holds {slots[id(value)].name!r} in a tuple, which can't follow its "
                        f"slices: use a list."
                    )
                if id(value) in slots:
                    yield vars(module) if container is direct else container, key, slots[id(value)]
                elif isinstance(value, dict | list | tuple):
                    left.append(value)


def cuts_of(dims: Mapping[int, Tensor]) -> Cuts:
    """Return positions as slices where they are evenly spaced; slices come first, so that less is copied."""
    found = [(dim, _as_slice(positions)) for dim, positions in dims.items()]
    return tuple(sorted(found, key=lambda cut: isinstance(cut[1], Tensor)))


def _as_slice(positions: Tensor) -> slice | Tensor:
    """Return evenly spaced positions as a slice.

    Example:
        >>> _as_slice(torch.tensor([1, 3, 5])), _as_slice(torch.tensor([0, 1, 4]))
        (slice(1, 6, 2), tensor([0, 1, 4]))
    """
    first, last, n = int(positions[0]), int(positions[-1]), len(positions)
    step = int(positions[1]) - first if n > 1 else 1
    if step > 0 and torch.equal(positions, torch.arange(first, first + n * step, step)):
        return slice(first, last + 1, step)
    return positions


def _cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    for dim, cut in cuts:
        if isinstance(cut, slice):
            tensor = tensor[(slice(None),) * dim + (cut,)]
        else:
            with torch.inference_mode(False):  # a copy may be used in training later
                tensor = tensor.index_select(dim, cut.to(tensor.device))
    return tensor
