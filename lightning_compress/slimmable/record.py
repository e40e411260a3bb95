"""The record of widths in the metadata of a state dict, from which another process gives a network its widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from lightning_compress.core.records import RecordError, shown
from lightning_compress.core.structure import Arriving, Structure
from lightning_compress.slimmable.norms import KIND, NORMS, Norms, WidthNorms, key_of, norms_of, way_at
from lightning_compress.slimmable.widths import checked_widths


class WidthStructure(Structure):
    """A network with widths: which, and how their norms were trained; its tensors are those of the norms per width."""

    kind: ClassVar[str] = KIND

    @classmethod
    def own_keys(cls, record: Mapping[str, Any]) -> tuple[str, ...]:
        return (f"{NORMS}.",)

    @classmethod
    def when_lost(cls, model: nn.Module, names: list[str]) -> str | None:
        path = f"{names[0]}.{NORMS}" if names[0] else NORMS
        return (
            f"{type(model).__name__} has loaded the full network, and not what norms hold for each width at {path!r}: "
            f"wrap it in SlimmableWidth(module, widths) first, or use load_compressed, to have its widths as well."
        )

    def runs_as(self, module: nn.Module) -> tuple[str, ...]:
        held = norms_of(module)
        return () if held is None else tuple(way_at(width) for width in held.widths if held.is_tracked(width))

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        held = norms_of(module)
        if held is None:
            return None
        return {
            "widths": list(held.widths),
            "norms": held.norms,
            "allow_inexact": held.allow_inexact,
            "tensors": {
                key_of(width): {path: list(_names(one)) for path, one in held.of(width).items()}
                for width in held.widths[:-1]
            },
        }

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        widths, norms = _widths(record), _norms(record)
        known = norms_of(module)
        if known is not None and known.widths != widths:
            raise RecordError(
                f"The network was saved with the widths {', '.join(map(str, widths))}, and this one has "
                f"{', '.join(map(str, known.widths))}: build it with the same widths."
            )
        if known is not None and known.norms != norms:
            raise RecordError(f"The network was saved with norms={norms!r}, and this one has norms={known.norms!r}.")
        if known is None:
            _held(record, arriving)

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        if record is None or norms_of(module) is not None:
            return  # a state dict without widths says nothing of them, and a strict load will
        like = next(iter(module.parameters()), None)
        inexact = record.get("allow_inexact") is True
        held = WidthNorms(_widths(record), _norms(record), _held(record, arriving), allow_inexact=inexact)
        module.add_module(NORMS, held if like is None else held.to(like.device))
        held.train(module.training)


def note_widths(network: nn.Module) -> None:
    """Have the state dicts of a network say what widths it has, and its loads take those of others."""
    WidthStructure().attach_once(network)


def _names(module: nn.Module) -> list[str]:
    """Return the names of the tensors that a module itself holds."""
    tables = (module._parameters, module._buffers)
    return [name for table in tables for name, tensor in table.items() if tensor is not None]


def _widths(record: Mapping[str, Any]) -> tuple[float, ...]:
    widths = record.get("widths")
    try:
        found = checked_widths(widths) if isinstance(widths, list) else ()
    except ValueError:
        found = ()
    if not found or list(found) != widths:
        raise RecordError(f"The record of widths has widths {shown(widths)}, which are no ascending list up to 1.0.")
    return found


def _norms(record: Mapping[str, Any]) -> Norms:
    norms = record.get("norms")
    for known in get_args(Norms):
        if norms == known:
            found: Norms = known
            return found
    raise RecordError(f"The record of widths has norms {shown(norms)}, which are none of {', '.join(get_args(Norms))}.")


def _held(record: Mapping[str, Any], arriving: Arriving) -> dict[float, dict[str, dict[str, Tensor]]]:
    """Return copies of the tensors that the state dict has for each width, by path and name."""
    given, widths = record.get("tensors"), _widths(record)
    found: dict[float, dict[str, dict[str, Tensor]]] = {}
    for width in widths[:-1]:
        paths = given.get(key_of(width)) if isinstance(given, Mapping) else None
        if not isinstance(paths, Mapping) or not all(isinstance(names, list) for names in paths.values()):
            raise RecordError(f"The record of widths has tensors {shown(given)}, which are not by width and path.")
        found[width] = {path: {} for path in paths}
        for path, names in paths.items():
            for name in names:
                where = ".".join(one for one in (NORMS, key_of(width), path, name) if one)
                tensor = arriving.state_dict.get(f"{arriving.prefix}{where}")
                if not isinstance(tensor, Tensor):
                    raise RecordError(f"The record of widths has a tensor {where!r}, which the state dict lacks.")
                found[width][path][str(name)] = tensor.detach().clone()
    return found
