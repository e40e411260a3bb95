"""The record of a block that has left, in the metadata of a state dict, from which a dense network loses it as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from lightning_compress.block_pruning.stand_in import StandIn, check_described, replace, restore, stand_ins
from lightning_compress.core.records import RecordError, shown
from lightning_compress.core.structure import Arriving, Structure, structures


class DepthStructure(Structure):
    """A module that stands in for one of a block that has left. A state dict with the block's tensors restores it."""

    kind: ClassVar[str] = "depth"
    renames: ClassVar[bool] = True  # names are missing

    @classmethod
    def when_lost(cls, model: nn.Module, names: list[str]) -> str | None:
        return (
            f"{type(model).__name__} was loaded from a network that blocks have left, and still has them, with the "
            f"weights that it had, at {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}: use "
            f"load_compressed, to have the network without them."
        )

    @classmethod
    def when_refused(cls, model: nn.Module) -> str:
        return (
            f"The state dict is of a network that blocks have left: load_compressed takes the same blocks out of a new "
            f"{type(model).__name__}, and then loads it."
        )

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        if not isinstance(module, StandIn):
            return None  # a load has restored the block
        return {"returns": dict(module.described), "block": module.block, "macs": module.macs}

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        check_described(record.get("returns"))
        block, macs = record.get("block"), record.get("macs")
        if not isinstance(block, str) or type(macs) is not int or macs < 0:
            raise RecordError(
                f"The record of a block that has left has the name {shown(block)} and {shown(macs)} MACs; expected a "
                f"text and a number from 0 on."
            )
        if not arriving.prefix and not isinstance(module, StandIn):
            raise RecordError("The record says that the whole network has left.")
        if (name := _first_within(arriving)) is not None:
            raise RecordError(
                f"The record says that the block {block!r} has left, and the state dict has its {name!r}."
            )

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        if isinstance(module, StandIn):
            if record is None and (arriving.has_metadata or _first_within(arriving) is not None):
                restore(module)
            elif record is not None:
                module.described, module.block, module.macs = record["returns"], record["block"], record["macs"]
        elif record is not None:
            replace(module, record["returns"], block=record["block"], macs=record["macs"])


class DepthCopy(Structure):
    """A copy of a network, such as a moving average, that loses the blocks that its leader has lost."""

    kind: ClassVar[str] = "depth"

    def __init__(self, leader: nn.Module) -> None:
        self.leader = leader

    def write(self, module: nn.Module) -> None:
        return None

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        pass

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        mine = dict(module.named_modules())
        left = stand_ins(self.leader)
        for path, own in stand_ins(module).items():
            if path not in left:
                restore(own)
        for path, one in left.items():
            start = f"{arriving.prefix}{path}."
            if path in mine and not any(name.startswith(start) for name in arriving.state_dict):
                become(mine[path], one.described, block=one.block, macs=one.macs)

    def __deepcopy__(self, memo: Any) -> DepthCopy:
        return DepthCopy(self.leader)


def become(module: nn.Module, described: Mapping[str, Any], *, block: str, macs: int) -> None:
    """Make a module a stand-in for good, if it is none, and have state dicts say so."""
    if not isinstance(module, StandIn):
        replace(module, described, block=block, macs=macs)
    note_depth(module)


def note_depth(module: nn.Module) -> None:
    """Have the state dicts of a stand-in say what it is."""
    DepthStructure().attach_once(module)


def follow_depth(copy: nn.Module, leader: nn.Module) -> None:
    """Make a copy, such as a moving average, lose the leader's blocks when it is loaded after its leader."""
    if not any(isinstance(one, DepthCopy) for one in structures(copy)):
        DepthCopy(leader).attach(copy)


def _first_within(arriving: Arriving) -> str | None:
    """Return the name of a tensor of the module in the state dict."""
    return next((name for name in arriving.state_dict if name.startswith(arriving.prefix)), None)
