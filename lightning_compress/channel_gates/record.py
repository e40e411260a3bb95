"""The record of gates in the metadata of a state dict, from which another process gives a network its gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from lightning_compress.channel_gates.gates import GATES, LayerGates, gates_of
from lightning_compress.channel_gates.kinds import Layer, checked_share
from lightning_compress.channel_gates.making import give_gates
from lightning_compress.core.records import RecordError, shown
from lightning_compress.core.structure import Arriving, Structure

_FIELDS = {"name": str, "end": str, "inputs": int, "channels": int, "last": bool}


class ChannelGateStructure(Structure):
    """A network whose layers have gates: which layers, and the share of their channels that each sample keeps."""

    kind: ClassVar[str] = "channel_gates"

    @classmethod
    def own_keys(cls, record: Mapping[str, Any]) -> tuple[str, ...]:
        return (f"{GATES}.",)

    @classmethod
    def when_lost(cls, model: nn.Module, names: list[str]) -> str | None:
        path = f"{names[0]}.{GATES}" if names[0] else GATES
        return (
            f"{type(model).__name__} has loaded everything but the gates of channels at {path!r}, so that all channels "
            f"are kept, with which the network was not trained: wrap it in ChannelGates(module) first, or use "
            f"load_compressed, to have the gates as well."
        )

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        gates = gates_of(module)
        if gates is None:
            return None
        orders = gates.orders
        return {
            "share": gates.share,
            "layers": [[getattr(one, name) for name in _FIELDS] for one in gates.layers],
            "orders": None if orders is None else [list(orders[layer.name]) for layer in gates.layers],
        }

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        layers, _ = _layers(record), _share(record)
        orders, known = _orders(record), gates_of(module)
        if known is not None and known.layers != layers:
            raise RecordError(
                f"The network was saved with gates at {_named(layers)}, and this one has them at "
                f"{_named(known.layers)}: build it with the same layers."
            )
        if known is not None and (known.orders is None) != (orders is None):
            raise RecordError(
                f"The network was saved with gates that choose {_choices(orders)}, and those of this one choose "
                f"{_choices(known.orders)}: build it with the same train=."
            )
        for layer in layers:
            for name in (layer.name, layer.end):
                try:
                    module.get_submodule(name)
                except AttributeError as error:
                    raise RecordError(
                        f"The network was saved with gates at {name!r}, which {type(module).__name__} does not have."
                    ) from error

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        if record is None:
            return  # a state dict without gates says nothing of them, and a strict load will
        gates = gates_of(module)
        if gates is None:
            gates = LayerGates(_layers(record), _share(record), _orders(record))
            like = next(iter(module.parameters()), None)
            give_gates(module, gates if like is None else gates.to(like.device, like.dtype))
        gates.share = _share(record)
        gates.reorder(_orders(record))


def note_gates(network: nn.Module) -> None:
    """Have the state dicts of a network say what gates it has, and its loads take those of others."""
    ChannelGateStructure().attach_once(network)


def _named(layers: tuple[Layer, ...]) -> str:
    return ", ".join(layer.name for layer in layers)


def _choices(orders: Any) -> str:
    return "single channels" if orders is None else "groups of channels"


def _share(record: Mapping[str, Any]) -> float:
    try:
        return checked_share(record.get("share"))  # type: ignore[arg-type]
    except ValueError as error:
        raise RecordError(f"The record of channel gates has a share {shown(record.get('share'))}: {error}") from error


def _layers(record: Mapping[str, Any]) -> tuple[Layer, ...]:
    given = record.get("layers")
    found: list[Layer] = []
    for one in given if isinstance(given, list | tuple) else ():
        fits = isinstance(one, list | tuple) and len(one) == len(_FIELDS)
        if not fits or any(type(value) is not kind for value, kind in zip(one, _FIELDS.values(), strict=True)):
            found = []
            break
        found.append(Layer(*one))
    if not found or any(min(layer.inputs, layer.channels) < 1 for layer in found):
        raise RecordError(f"The record of channel gates has layers {shown(given)}, which are no list of layers.")
    return tuple(found)


def _orders(record: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    given, layers = record.get("orders"), _layers(record)
    if given is None:
        return None
    fits = isinstance(given, list | tuple) and len(given) == len(layers)
    if not fits or any(
        not isinstance(order, list | tuple)
        or any(type(place) is not int for place in order)
        or sorted(order) != list(range(layer.channels))
        for order, layer in zip(given, layers, strict=True)
    ):
        raise RecordError(f"The record of channel gates has orders {shown(given)}, which do not order the channels.")
    return {layer.name: tuple(order) for layer, order in zip(layers, given, strict=True)}
