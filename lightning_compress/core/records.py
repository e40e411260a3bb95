"""Records in the metadata of state dicts: their kinds, and how to read those of this and of earlier versions.

metadata["layer"]["lightning_compress.structure"] = {"grid": {"format": 1, "scale": 0.5, ...}}
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.core.structure import Structure

KEY = "lightning_compress.structure"  # the key of a module's records, by kind, in its metadata
KINDS = {  # the class of each kind, imported when a state dict has one; networks are rebuilt in this order
    "depth": "lightning_compress.block_pruning.record.DepthStructure",  # others are of layers that are left
    "low_rank": "lightning_compress.low_rank.record.LowRankStructure",  # parts of replaced layers are cut afterwards
    "conv_block": "lightning_compress.conv_substitution.record.ConvBlockStructure",
    "exits": "lightning_compress.early_exit.record.ExitStructure",  # after "cut": a cut network has thinner heads
    "widths": "lightning_compress.slimmable.record.WidthStructure",
    "channel_gates": "lightning_compress.channel_gates.record.ChannelGateStructure",
    "gates": "lightning_compress.skipping.record.GateStructure",
    "cut": "lightning_compress.channels.load.CutNetwork",
    "seeded": "lightning_compress.supermask.record.SeededStructure",
    "grid": "lightning_compress.quantization.input_grids.InputQuantizer",
    "sign": "lightning_compress.binary.inputs.BinaryInput",
}
_OLD_CUT, _OLD_INPUTS = "lightning_compress", "lightning_compress.inputs"  # keys from before records had a format


class RecordError(ValueError):
    """A record has a content that this package never writes; the network was not changed."""


class UnknownRecordError(ValueError):
    """A record is of a kind, or in a format, that this version does not know; the network was not changed."""


def shown(value: Any) -> str:
    """Return a short text for any value read from a file, for messages.

    Example:
        >>> shown("x" * 100), shown(10**5000)
        ("'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...", 'an object of type int with too many digits')
    """
    try:
        text = repr(value)
    except ValueError:
        return f"an object of type {type(value).__name__} with too many digits"
    return text if len(text) < 60 else f"{text[:57]}..."


def kind_class(kind: str) -> type[Structure]:
    """Import and return the class of a kind."""
    module, _, name = KINDS[kind].rpartition(".")
    found: type[Structure] = getattr(import_module(module), name)
    return found


def records(metadata: Mapping[str, Any] | None, prefix: str = "") -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the records in the metadata of a state dict: by kind, and by path of the module below `prefix`.

    Raises:
        RecordError: A record has a form that no version writes.
        UnknownRecordError: This version does not know the kind, or the format.
    """
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for path, entry in (metadata or {}).items():
        if isinstance(entry, Mapping) and f"{path}.".startswith(prefix):
            for kind, record in _kinds_in(path, entry).items():
                found.setdefault(kind, {})[f"{path}."[len(prefix) :].rstrip(".")] = record
    return found


def _kinds_in(path: str, entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the records of one module, including those that earlier versions wrote under other keys."""
    given = dict(_as_dict(entry[KEY], path)) if KEY in entry else {}
    if _OLD_CUT in entry:
        given["cut"] = {"format": 1, **_as_dict(entry[_OLD_CUT], path)}
    if _OLD_INPUTS in entry:
        old = dict(_as_dict(entry[_OLD_INPUTS], path))
        given[str(old.pop("kind", None))] = {"format": 1, **old}
    found: dict[str, Mapping[str, Any]] = {}
    for kind, value in given.items():
        record = dict(_as_dict(value, path))
        form = record.pop("format", None)
        if not isinstance(form, int) or isinstance(form, bool) or not 0 < form < 1 << 31:
            raise RecordError(
                f"The record {shown(kind)} of {path!r} has {shown(form)} as its format, which is no number above 0."
            )
        if kind not in KINDS or form > (known := kind_class(kind).format):
            from lightning_compress import __version__

            what = "which does not know it" if kind not in KINDS else f"which reads formats up to {known}"
            raise UnknownRecordError(
                f"The network was saved with a record of the kind {shown(kind)} in format {form} for its module "
                f"{path!r}. This version of lightning_compress is {__version__}, {what}: load the network with the "
                f"version that saved it, or a later one."
            )
        found[kind] = record
    return found


def _as_dict(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RecordError(f"The record of {path!r} is {shown(value)}; expected a dict with strings as keys.")
    return value
