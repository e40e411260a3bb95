"""The network of one width: the classes of the full network, and slices of its tensors.

    conv.weight (64, 32, 3, 3)     at width 0.5:  weight[:32, :16], a view
    conv.weight after a concat                    weight[:32, [0..15, 32..47]], a gather: the numbers are copied

Nothing of it is in a state dict: the numbers are those of the full network, and a step of an optimizer, a load, or a
move to another device changes both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.groups import ChannelGroups, positions_kept
from lightning_compress.channels.removal import drop_of
from lightning_compress.core.evaluation import set_mode
from lightning_compress.core.tensors import named_tensors
from lightning_compress.slimmable.norms import NORMS, tracks
from lightning_compress.slimmable.skeleton import skeleton_of
from lightning_compress.slimmable.widths import masks_of

_TABLES = ("_parameters", "_buffers")
_PLAIN = (bool, int, float, str, type(None))
Cuts = tuple[tuple[int, slice | Tensor], ...]  # by dimension the positions that stay


class ThinNetwork:
    """A network with the first channels of its groups only.

    Its modules follow those of the network at every `refresh`: their modes, numbers and strings, tensors, hooks, and
    children. Other things that modules hold, such as lists and tables, are copies made when the thin network was.

    Args:
        network: The full network, which stays as it is.
        groups: Of the network.
        counts: By group how many of its first channels stay; a group without a count stays whole.
        norms: By path of a norm what it holds in place of slices of the network's: statistics, and maybe scale and
            shift.
        tracked: Whether training updates the statistics in `norms`. The network's own are never updated.

    Attributes:
        module: The thin network, whose tensors are slices as of the last `refresh`. It is registered nowhere.

    Raises:
        ValueError: A count is none, a tensor of a group is not there or too small, or a module can't be copied.

    Example:
        >>> from lightning_compress.channels.find import channel_groups
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> thin = ThinNetwork(net, channel_groups(net, torch.zeros(2, 3)), {"0": 4})
        >>> thin.module
        Sequential(
          (0): Linear(in_features=3, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
        >>> thin.module[2].weight.data_ptr() == net[2].weight.data_ptr()
        True
    """

    module: nn.Module
    _slots: list[_Slot]

    def __init__(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        counts: Mapping[str, int],
        norms: Mapping[str, nn.Module] | None = None,
        *,
        tracked: bool = True,
    ) -> None:
        self.network, self.groups, self.counts = network, groups, dict(counts)
        self.norms, self.tracked = dict(norms or {}), tracked
        self._training, self._stale = network.training, True
        self._build()
        self.refresh(gradients=False)

    def refresh(self, *, gradients: bool) -> None:
        """Take the network's present tensors and modes.

        Args:
            gradients: Whether slices are taken anew, as parts of autograd's graph: then gradients reach the network's
                parameters. Otherwise views are kept, and copies are made anew if the network's tensor is another one
                or was written into. A write through `.data` into a tensor of which copies are made is seen when the
                mode changes, or after a refresh with gradients.
        """
        try:
            for pair in self._pairs:
                pair.follow()
        except KeyError:
            self._build()
        if self.network.training is not self._training:
            self._renew_caches()
        self._renew(gradients=gradients, anew=gradients or self._stale)
        self._stale = gradients

    def _renew(self, *, gradients: bool, anew: bool) -> None:
        taken: dict[int, Tensor] = {}
        for slot in self._slots:
            slot.renew(taken, gradients=gradients, anew=anew)
        for container, key, slot in self._held:
            container[key] = slot.value

    def gathered(self) -> float:
        """Return the share of the thin network's numbers that are copied, because no view has them."""
        every = {id(one): one.numel() for one in named_tensors(self.module).values()}
        copied = {id(slot.value): slot.value.numel() for slot in self._slots if slot.gathers}
        return float(sum(copied.values())) / max(1, sum(every.values()))

    def _build(self) -> None:
        """Make the skeleton, and find out where its tensors come from."""
        network, groups = self.network, self.groups
        masks = masks_of(groups, self.counts)
        tensors = named_tensors(network)
        _check(groups, masks, tensors)
        kept = positions_kept(groups, masks, tensors)
        cuts = {id(tensors[name]): _cuts(dims) for name, dims in kept.items()}
        stay = {name: mask.nonzero().squeeze(1) for name, mask in masks.items()}
        drop = drop_of({group.name: group for group in groups}, stay)
        paths = dict(network.named_modules(remove_duplicate=False))
        own = {path for path in self.norms if path in paths}
        still = {path for path, one in paths.items() if tracks(one) and not (self.tracked and path in own)}
        still = {path for path in still if not path.startswith(f"{NORMS}.")}
        self.module, copies = skeleton_of(network, drop, cuts.keys(), own | still, NORMS)
        given = {paths[path]: self.norms[path] for path in own}
        fixed = {paths[path] for path in still}
        self._slots = [
            slot
            for module, one in copies.items()
            for table in _TABLES
            for slot in _slots(module, one, table, cuts, given.get(module), module in fixed)
        ]
        self._held = list(_held(copies.values(), {id(slot.target[slot.name]): slot for slot in self._slots}))
        for module in fixed:
            vars(copies[module])["momentum"] = 0.0  # so that no batch counts
        self._pairs = [_Pair(module, one) for module, one in copies.items()]
        self._renew(gradients=False, anew=True)
        self._renew_caches()

    def _renew_caches(self) -> None:
        """Have modules that override `train` drop or renew what they cache for evaluation."""
        self._training, self._stale = self.network.training, True
        if all(type(one).train is nn.Module.train for one in self.module.modules()):
            return
        modes = [(one, one.training) for one in (*self.network.modules(), *self.module.modules())]
        try:
            set_mode(self.module, not self._training)
            set_mode(self.module, self._training)
        finally:
            for one, mode in modes:
                one.training = mode


class _Slot:
    """A tensor of the skeleton, and where it comes from.

    Attributes:
        value: What the skeleton has there now.
        gathers: Whether it is a copy.
    """

    def __init__(self, table: dict[str, Any], name: str, target: dict[str, Any], cuts: Cuts) -> None:
        self.table, self.name, self.target, self._cuts = table, name, target, cuts
        self.gathers = any(isinstance(cut, Tensor) for _, cut in cuts)
        self.value: Any = None
        self._source: Any = None
        self._place: int | None = None
        self._version = 0

    def renew(self, taken: dict[int, Tensor], *, gradients: bool, anew: bool) -> None:
        """Take the network's tensor, if it has another one or another content now, or if `anew`."""
        source = self.table[self.name]
        same = source is self._source and not anew
        if not self._cuts:
            if not same:
                self._source = self.value = self.target[self.name] = source
            return
        place = _place(source)
        if same and place == self._place and (not self.gathers or source._version == self._version):
            return
        if id(source) not in taken:  # it may have several names
            taken[id(source)] = _cut(source if gradients else source.detach(), self._cuts)
        self._source, self._place = source, place
        self._version = source._version if self.gathers else 0
        self.value = self.target[self.name] = taken[id(source)]


class _Pair:
    """A module of the network, and its copy, which follows its numbers and strings."""

    def __init__(self, module: nn.Module, copied: nn.Module) -> None:
        self._module, self._kind = module, type(module)
        self._entries, self._own = vars(module), vars(copied)
        self._children = list(module._modules.values())
        alike = {
            name
            for name, value in self._entries.items()
            if type(value) in _PLAIN and name in self._own and self._own[name] == value
        }
        self._names = ("training", *sorted({*alike, "_is_full_backward_hook"} - {"training"}))
        self._get = itemgetter(*self._names)
        self._seen: Any = None

    def follow(self) -> None:
        """Take the module's present numbers.

        Raises:
            KeyError: It has other children, is of another class, or has lost a number: it needs another copy.
        """
        if type(self._module) is not self._kind or (
            self._children and list(self._module._modules.values()) != self._children
        ):
            raise KeyError
        now = self._get(self._entries)
        if now != self._seen:
            self._own.update(zip(self._names, now, strict=True))
            self._seen = now


def _slots(
    module: nn.Module,
    copied: nn.Module,
    table: str,
    cuts: Mapping[int, Cuts],
    given: nn.Module | None,
    fixed: bool,
) -> list[_Slot]:
    """Return the slots of one table of a module's tensors; none if the copy shares the table.

    Args:
        module: Of the network.
        copied: Of the skeleton.
        table: The table's name.
        cuts: By id of a tensor of the network.
        given: Has tensors that take the place of the module's.
        fixed: Whether the copy counts its batches by itself.
    """
    mine, theirs = vars(module)[table], {} if given is None else vars(given)[table]
    if not theirs and not fixed and all(id(tensor) not in cuts for tensor in mine.values()):
        vars(copied)[table] = mine  # whatever it gets later, the copy has as well
        return []
    target = vars(copied)[table] = dict(vars(copied)[table])
    found = []
    for name, tensor in mine.items():
        if fixed and name == "num_batches_tracked":
            target[name] = None if tensor is None else torch.zeros_like(tensor)
        else:
            source = theirs if name in theirs else mine
            found.append(_Slot(source, name, target, () if source is theirs else cuts.get(id(tensor), ())))
    return found


def _held(copies: Iterable[nn.Module], slots: Mapping[int, _Slot]) -> Iterator[tuple[Any, Any, _Slot]]:
    """Return the containers in modules that hold tensors of slots, with the key or position of each.

    Args:
        copies: The modules.
        slots: By id of the placeholder.

    Raises:
        ValueError: A tuple holds one.
    """
    for module in copies:
        left: list[Any] = [{name: one for name, one in vars(module).items() if name not in (*_TABLES, "_modules")}]
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


def _place(tensor: Tensor) -> int | None:
    """Return where a tensor's numbers are; None for tensors of torch.func, which have no place."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


def _check(groups: ChannelGroups, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if the groups that get thinner are those of another network."""
    for group in (one for one in groups if one.name in masks):
        for one in group.members:
            there = tensors[one.tensor].shape if one.tensor in tensors else None
            if there is None or one.dim >= len(there) or there[one.dim] <= int(one.index.max()):
                found = "does not exist" if there is None else f"has shape {tuple(there)}"
                raise ValueError(
                    f"{one.tensor} {found}, and {group.name!r} has channels up to position {int(one.index.max())} of "
                    f"its dimension {one.dim}: the network has changed since its channel groups were found. Find them "
                    f"anew, and give it its widths again."
                )


def _cuts(dims: Mapping[int, Tensor]) -> Cuts:
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
