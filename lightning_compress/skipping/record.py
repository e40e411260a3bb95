"""The record of gates in the metadata of a state dict, from which another process gives a network its gates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, get_args

import torch
from torch import nn

from lightning_compress.core.records import RecordError, shown
from lightning_compress.core.structure import Arriving, Structure, detach, structures
from lightning_compress.skipping.gate_modules import Features
from lightning_compress.skipping.gates import GATES, GateKind, SkipGates, gates_of
from lightning_compress.stages.block import Block
from lightning_compress.stages.branch_hooks import gated, ungate

_MOST = 1 << 16  # channels or blocks that a file may ask for


class GateStructure(Structure):
    """A network with gates: its blocks, what the gates read, and the measured rates."""

    kind: ClassVar[str] = "gates"

    @classmethod
    def own_keys(cls, record: Mapping[str, Any]) -> tuple[str, ...]:
        return (f"{GATES}.",)

    @classmethod
    def when_lost(cls, model: nn.Module, names: list[str]) -> str | None:
        path = f"{names[0]}.{GATES}" if names[0] else GATES
        return (
            f"{type(model).__name__} has loaded everything but the gates at {path!r}, so that it runs all blocks for "
            f"every sample: wrap it in SkippableBlocks(module) first, or use load_compressed, to have them as well."
        )

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        gates = gates_of(module)
        if gates is None:
            return None
        return {
            "gate": gates.kind,
            "macs": gates.macs,
            "blocks": [asdict(one) | {"modules": list(one.modules)} for one in gates.blocks],
            "features": [[one.dims, one.axis, one.channels] for one in gates.features],
            "rates": [None if math.isnan(rate) else rate for rate in gates.rates.tolist()],
        }

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        made = _made(record)
        known = gates_of(module)
        if known is not None and _said(known) != _said(made):
            raise RecordError(
                f"The network was saved with {_said(made)}, and this one has {_said(known)}: build it with the same."
            )
        for block in made.blocks if known is None else ():
            for path in (block.reads, block.ends):
                try:
                    module.get_submodule(path)
                except AttributeError as error:
                    raise RecordError(
                        f"The record of gates has a block {shown(block.name)} with a module {shown(path)}, which "
                        f"{type(module).__name__} does not have."
                    ) from error

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        if record is None:
            return  # a state dict without gates says nothing of them, and a strict load will
        made = _made(record)
        known = gates_of(module)
        if known is None:
            like = next(iter(module.parameters()), None)
            put_gates(module, made if like is None else made.to(like.device, like.dtype))
        else:
            known.rates = made.rates


def give_gates(network: nn.Module, gates: SkipGates) -> None:
    """Make gates a part of a network and of its state dict's records, and have them decide whenever it runs.

    Raises:
        ValueError: The network has something else under the name `skip_gates`.
    """
    if hasattr(network, GATES):
        raise ValueError(f"{type(network).__name__} has a {GATES} of its own already: rename yours.")
    put_gates(network, gates)
    note_gates(network)


def put_gates(network: nn.Module, gates: SkipGates) -> None:
    """Add gates to a network, with the hooks that call them."""
    network.add_module(GATES, gates)
    gates.train(network.training)
    gated(network, gates.blocks, gates.decide, gates.begin_pass)


def note_gates(network: nn.Module) -> None:
    """Have the state dicts of a network say what gates it has, and its loads take those of others."""
    GateStructure().attach_once(network)


def take_gates(network: nn.Module) -> None:
    """Take the gates away from a network, with their hooks and their record."""
    network._modules.pop(GATES, None)
    ungate(network)
    for one in structures(network):
        if isinstance(one, GateStructure):
            detach(network, one)


def _made(record: Mapping[str, Any]) -> SkipGates:
    """Return the gates of a record, with weights of their own."""
    blocks, features = _blocks(record), _features(record)
    if len(blocks) != len(features):
        raise RecordError(f"The record of gates has {len(blocks)} blocks, and features of {len(features)}.")
    kind: Any = record.get("gate")
    macs: Any = record.get("macs")
    if kind not in get_args(GateKind):
        raise RecordError(
            f"The record of gates has gates {shown(kind)}, which are none of {', '.join(get_args(GateKind))}."
        )
    if not _is_size(macs) or macs < sum(one.macs for one in blocks):
        raise RecordError(f"The record of gates has {shown(macs)} MACs, which are less than its blocks have.")
    with torch.random.fork_rng([]):
        made = SkipGates(blocks, features, macs=macs, kind=kind)
    made.rates = _rates(record, len(blocks))
    return made


def _said(gates: SkipGates) -> str:
    return f"gates of the kind {gates.kind} before {', '.join(one.name for one in gates.blocks)}"


def _blocks(record: Mapping[str, Any]) -> tuple[Block, ...]:
    given = record.get("blocks")
    if not isinstance(given, list) or not 0 < len(given) <= _MOST:
        raise RecordError(f"The record of gates has blocks {shown(given)}, which are no list.")
    names, found = {one.name for one in fields(Block)}, []
    for one in given:
        values = dict(one) if isinstance(one, Mapping) else {}
        texts = [values.get(name) for name in names - {"modules", "macs"}]
        modules = values.get("modules")
        if not (
            values.keys() == names
            and all(isinstance(text, str) for text in texts)
            and isinstance(modules, list)
            and all(isinstance(name, str) for name in modules)
            and _is_size(values["macs"])
        ):
            raise RecordError(f"The record of gates has a block {shown(one)}, which is none.")
        found.append(Block(**values | {"modules": tuple(modules)}))
    return tuple(found)


def _features(record: Mapping[str, Any]) -> list[Features]:
    given = record.get("features")
    if not isinstance(given, list):
        raise RecordError(f"The record of gates has features {shown(given)}, which are no list.")
    for one in given:
        if not (
            isinstance(one, list)
            and len(one) == 3
            and all(map(_is_size, one))
            and 0 < one[1] < one[0] < 9
            and one[2] <= _MOST
        ):
            raise RecordError(f"The record of gates has features {shown(one)}, which are no dimensions and channels.")
    return [Features(*one) for one in given]


def _rates(record: Mapping[str, Any], blocks: int) -> torch.Tensor:
    given = record.get("rates")
    if not isinstance(given, list) or len(given) != blocks:
        raise RecordError(f"The record of gates has rates {shown(given)}, and {blocks} blocks.")
    for rate in given:
        if rate is not None and not (isinstance(rate, float | int) and 0.0 <= rate <= 1.0):
            raise RecordError(f"The record of gates has a rate {shown(rate)}, which is no share.")
    return torch.tensor([float("nan") if rate is None else float(rate) for rate in given], dtype=torch.float64)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 48
