"""The network of one width: the classes of the full network, and slices of its tensors.

    conv.weight (64, 32, 3, 3)     at width 0.5:  weight[:32, :16], a view
    conv.weight after a concat                    weight[:32, [0..15, 32..47]], a gather: the numbers are copied

Nothing of it is in a state dict: the numbers are those of the full network, and a step of an optimizer, a load, or a
move to another device changes both.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_compress.channels.groups import ChannelGroups, positions_kept
from lightning_compress.channels.removal import drop_of
from lightning_compress.core.answering import mark_way
from lightning_compress.core.evaluation import set_mode
from lightning_compress.core.recalibrate import tracks
from lightning_compress.core.select import is_weight_layer
from lightning_compress.core.tensors import named_tensors
from lightning_compress.slimmable.follow import TABLES, Pair, Slot, Watch, cuts_of, held_in, slots_of
from lightning_compress.slimmable.norms import NORMS
from lightning_compress.slimmable.skeleton import skeleton_of
from lightning_compress.slimmable.widths import masks_of


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
        contiguous: Whether to copy also what a view has with gaps, where no gradients are wanted: a few per cent faster
            for single samples, and each width needs memory for its numbers.
        way: Of running the network, by whose name hooks on inputs know this width's layers; empty: they take them for
            those of the network.

    Attributes:
        module: The thin network, whose tensors are slices as of the last `refresh`. It is registered nowhere.

    Raises:
        ValueError: A count is none, a tensor of a group is not there or too small, or a module can't be copied.

    Example:
        >>> import torch
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
    _slots: list[Slot]

    def __init__(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        counts: Mapping[str, int],
        norms: Mapping[str, nn.Module] | None = None,
        *,
        tracked: bool = True,
        contiguous: bool = False,
        way: str = "",
    ) -> None:
        self.network, self.groups, self.counts = network, groups, dict(counts)
        self.norms, self.tracked, self.contiguous, self.way = dict(norms or {}), tracked, contiguous, way
        self._watch: Watch | None = None
        self._build()
        self.refresh(gradients=False)

    def refresh(self, *, gradients: bool) -> None:
        """Take the network's present tensors and modes.

        Without gradients, where nothing has changed since the last call, this takes microseconds. Numbers of torch's
        own layers, such as `eps`, are followed with gradients, at a change of the mode or of a tensor, and after
        `look_again`.

        Args:
            gradients: Whether slices are taken anew, as parts of autograd's graph: then gradients reach the network's
                parameters. Otherwise views are kept, and copies are made anew if the network's tensor is another one
                or was written into. A write through `.data` into a tensor of which copies are made is seen with
                gradients, at a change of the mode, and after `look_again`.
        """
        if not gradients and self._watch is not None and self._watch.same():
            return
        try:
            for pair in self._pairs:
                pair.follow()
        except KeyError:
            self._build()
        if self.network.training is not self._training:
            self._renew_caches()
        self._take(gradients=gradients)
        self._watch = None if gradients else Watch(self._pairs, self._slots)

    def look_again(self) -> None:
        """Have the next `refresh` follow everything that it follows with gradients."""
        self._watch = None

    def _take(self, *, gradients: bool) -> None:
        taken: dict[int, Tensor] = {}
        for slot in self._slots:
            slot.take(taken, gradients=gradients)
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
        cuts = {id(tensors[name]): cuts_of(dims) for name, dims in kept.items()}
        stay = {name: mask.nonzero().squeeze(1) for name, mask in masks.items()}
        drop = drop_of({group.name: group for group in groups}, stay)
        paths = dict(network.named_modules())  # a module with two paths once
        own = {path for path in self.norms if path in paths}
        still = {path for path, one in paths.items() if tracks(one) and not (self.tracked and path in own)}
        still = {path for path in still if not path.startswith(f"{NORMS}.")}
        layers = {path for path, one in paths.items() if self.way and is_weight_layer(one)}
        self.module, copies = skeleton_of(network, drop, cuts.keys(), own | still | layers, NORMS)
        for one in copies.values() if self.way else ():
            mark_way(one, self.way)
        given = {paths[path]: self.norms[path] for path in own}
        fixed = {paths[path] for path in still}
        self._slots = [
            slot
            for module, one in copies.items()
            for table in TABLES
            for slot in slots_of(
                module, one, table, cuts, given.get(module), module in fixed, contiguous=self.contiguous
            )
        ]
        self._held = list(held_in(copies.values(), {id(slot.target[slot.name]): slot for slot in self._slots}))
        for module in fixed:
            vars(copies[module])["momentum"] = 0.0  # so that no batch counts
        self._pairs = [Pair(module, one) for module, one in copies.items()]
        self._take(gradients=False)
        self._renew_caches()

    def _renew_caches(self) -> None:
        """Have modules that override `train` drop or renew what they cache for evaluation."""
        self._training = self.network.training
        if all(type(one).train is nn.Module.train for one in self.module.modules()):
            return
        modes = [(one, one.training) for one in (*self.network.modules(), *self.module.modules())]
        try:
            set_mode(self.module, not self._training)
            set_mode(self.module, self._training)
        finally:
            for one, mode in modes:
                one.training = mode


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
