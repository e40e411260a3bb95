"""The record of layers whose weights come from a seed, so that a file needs no weights but a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.core.records import RecordError, shown
from lightning_compress.core.seeded import Seeded
from lightning_compress.core.structure import Arriving, Structure, structures


class SeededStructure(Structure):
    """The origins of a module's own parameters.

    They say where values came from; whether the parameters still hold these values, masked, a file checks when it is
    written.

    Attributes:
        origins: The origin of each parameter, by its name within the module.
    """

    kind = "seeded"

    def __init__(self) -> None:
        self.origins: dict[str, Seeded] = {}

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        mine = module._parameters  # a parametrization, such as weight norm, takes a parameter away
        origins = {name: origin.record() for name, origin in self.origins.items() if name in mine}
        return {"origins": origins} if origins else None

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        try:
            known = _read(record).keys() <= module._parameters.keys()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecordError(
                f"The record of the seeds of {arriving.prefix.rstrip('.')!r} is not one that this version writes: "
                f"{shown(record)} ({error!r:.60})."
            ) from error
        if not known:
            raise RecordError(
                f"The record of the seeds of {arriving.prefix.rstrip('.')!r} names parameters that a "
                f"{type(module).__name__} does not have: {shown(record)}."
            )

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        self.origins = {} if record is None else _read(record)


def _read(record: Mapping[str, Any]) -> dict[str, Seeded]:
    return {name: Seeded.of(origin) for name, origin in record["origins"].items()}


def note_origins(model: nn.Module, origins: Mapping[str, Seeded]) -> None:
    """Make the state dicts of a model say which parameters come from a seed.

    Args:
        model: The network.
        origins: The origin of each parameter, by qualified name.
    """
    for name, origin in origins.items():
        path, _, short = name.rpartition(".")
        module = model.get_submodule(path)
        mine = next((one for one in structures(module) if isinstance(one, SeededStructure)), None)
        if mine is None:
            mine = SeededStructure()
            mine.attach(module)
        mine.origins = mine.origins | {short: origin}
