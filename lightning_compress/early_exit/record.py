"""The record of exit heads in the metadata of a state dict, from which another process gives a network its heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import nn

from lightning_compress.core.records import RecordError, shown
from lightning_compress.core.structure import Arriving, Structure, detach, structures
from lightning_compress.early_exit.heads import HEADS, ExitHeads, build_head, heads_of
from lightning_compress.early_exit.rules import ExitRule


class ExitStructure(Structure):
    """A network with exit heads: their layers, how each was made, and the rule by which samples leave.

    Args:
        wanted: The layers of heads that the network does not have yet, in any order, as far as they are known: a state
            dict with heads at other layers is refused.
    """

    kind: ClassVar[str] = "exits"

    def __init__(self, wanted: Collection[str] = ()) -> None:
        self.wanted = frozenset(wanted)

    @classmethod
    def own_keys(cls, record: Mapping[str, Any]) -> tuple[str, ...]:
        return (f"{HEADS}.",)

    @classmethod
    def when_lost(cls, model: nn.Module, names: list[str]) -> str | None:
        path = f"{names[0]}.{HEADS}" if names[0] else HEADS
        return (
            f"{type(model).__name__} has loaded everything but the exit heads at {path!r}: wrap it in "
            f"EarlyExitHeads(module, exits, num_classes=...) first, or use load_compressed, to have them as well."
        )

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        heads = heads_of(module)
        if heads is None:
            return None
        return {
            "layers": list(heads.layers),
            "num_classes": heads.num_classes,
            "heads": [None if one is None else [one[0], list(one[1])] for one in heads.described],
            "rule": None if heads.rule is None else heads.rule.to_dict(),
            "rules": {way: rule.to_dict() for way, rule in heads.rules.items() if way},
        }

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        layers, described = _layers(record), _described(record)
        _rules(record)
        known = heads_of(module)
        others = known.layers if known is not None else tuple(sorted(self.wanted))
        if others and (known.layers != layers if known is not None else self.wanted != set(layers)):
            raise RecordError(
                f"The network was saved with exits at {', '.join(layers)}, and this one has them at "
                f"{', '.join(others)}: build it with the same exits."
            )
        if known is not None:
            return
        for layer, one in zip(layers, described, strict=True):
            if one is None:
                raise ValueError(
                    f"The head of {layer!r} is a module of your own, which no file can rebuild: wrap the module in "
                    f"EarlyExitHeads with the same exits, heads and example_inputs= first, then load."
                )
            try:
                module.get_submodule(layer)
                build_head(one[0], one[1], int(record["num_classes"]))
            except (AttributeError, ValueError, TypeError, KeyError) as error:
                raise RecordError(
                    f"The head of {layer!r} can't be rebuilt in {type(module).__name__}: {error}"
                ) from error

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        if record is None:
            return  # a state dict without exits says nothing of them, and a strict load will
        heads = heads_of(module)
        if heads is None:
            described = [one for one in _described(record) if one is not None]
            classes = int(record["num_classes"])
            made = [build_head(kind, shape, classes) for kind, shape in described]
            heads = ExitHeads(_layers(record), made, num_classes=classes, described=described)
            like = next(iter(module.parameters()), None)
            module.add_module(HEADS, heads if like is None else heads.to(like.device, like.dtype))
            heads.train(module.training)
        heads.rules = _rules(record)


def give_heads(network: nn.Module, heads: ExitHeads) -> None:
    """Make heads a part of a network, and of its state dict's records.

    Raises:
        ValueError: The network has something else under the name `exit_heads`.
    """
    if hasattr(network, HEADS):
        raise ValueError(f"{type(network).__name__} has a {HEADS} of its own already: rename yours.")
    network.add_module(HEADS, heads)
    heads.train(network.training)
    note_heads(network)


def note_heads(network: nn.Module, wanted: Collection[str] = ()) -> None:
    """Have the state dicts of a network say what heads it has, and its loads take that from others.

    Args:
        network: It may have no heads yet; a load then makes those of the state dict.
        wanted: The layers of the heads that it may get so, as far as they are known.
    """
    if not any(isinstance(one, ExitStructure) for one in structures(network)):
        ExitStructure(wanted).attach(network)


def take_heads(network: nn.Module) -> None:
    """Take the heads away from a network, with their record."""
    network._modules.pop(HEADS, None)
    for one in structures(network):
        if isinstance(one, ExitStructure):
            detach(network, one)


def _layers(record: Mapping[str, Any]) -> tuple[str, ...]:
    layers = record.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(one, str) for one in layers):
        raise RecordError(f"The record of exits has layers {shown(layers)}, which are no list of names.")
    return tuple(layers)


def _described(record: Mapping[str, Any]) -> list[Any]:
    heads, layers = record.get("heads"), _layers(record)
    if not isinstance(heads, list) or len(heads) != len(layers):
        raise RecordError(f"The record of exits has heads {shown(heads)}, and {len(layers)} layers.")
    found = []
    for one in heads:
        if one is not None and not (
            isinstance(one, list | tuple)
            and len(one) == 2
            and isinstance(one[0], str)
            and all(isinstance(size, int) and size > 0 for size in one[1])
        ):
            raise RecordError(f"The record of exits has a head {shown(one)}, which is no kind and shape.")
        found.append(None if one is None else (one[0], tuple(one[1])))
    return found


def _rules(record: Mapping[str, Any]) -> dict[str, ExitRule]:
    """Return the rules by the way in which the network runs, of which earlier versions knew one."""
    others = record.get("rules", {})
    if not isinstance(others, Mapping) or not all(isinstance(way, str) for way in others):
        raise RecordError(f"The record of exits has rules {shown(others)}, which are not by name.")
    found = {}
    for way, rule in {"": record.get("rule"), **others}.items():
        try:
            if rule is not None:
                found[way] = ExitRule.from_dict(rule)
        except (TypeError, ValueError, AttributeError) as error:
            raise RecordError(f"The record of exits has a rule {shown(rule)}, which is none: {error}") from error
    return found
