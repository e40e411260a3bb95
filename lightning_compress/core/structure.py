"""Records in the metadata of a state dict, from which another process rebuilds the structure of a changed network.

    state_dict()   metadata["layer"]["lightning_compress.structure"] = {"grid": {"format": 1, "scale": 0.5, ...}}
    load           each record is checked, and rebuilds its module before torch copies tensors into it

Metadata survive checkpoints of weights alone, compressed files and a strict load into the plain class. A record belongs
to the module that it describes, so that a part of a network can be saved, loaded or used in another network.

A new kind of record needs a subclass of `Structure` in the room that writes it, and a line in `core.records.KINDS`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.hooks import Removable
from lightning_compress.core.records import KEY, KINDS, RecordError, kind_class, records
from lightning_compress.core.undo import as_before_on_error

_NEXT = "next_handle"  # key in the state of pickled hooks


@dataclass(frozen=True)
class Arriving:
    """A state dict on its way into a module.

    Attributes:
        state_dict: The whole state dict.
        prefix: The prefix of the names of the module's tensors in it.
        has_metadata: Whether the state dict has metadata of the module; a copied state dict may have none.
        strict: Whether the load fails where names differ.
    """

    state_dict: Mapping[str, Any]
    prefix: str
    has_metadata: bool
    strict: bool


class Structure:
    """A change of one module's structure that its tensors do not reveal. Each kind of record is a subclass.

    Attributes:
        kind: The name of the kind in files.
        format: The version number of the records that it writes; it reads those of all earlier versions.
        renames: Whether tensors have other names than in the user's class, so that only a rebuilt network can be
            compared with the names in a file.
    """

    kind: ClassVar[str]
    format: ClassVar[int] = 1
    renames: ClassVar[bool] = False

    @classmethod
    def new(cls, module: nn.Module, name: str) -> Structure:
        """Return the structure for a module that is about to be rebuilt; the module does not change yet."""
        return cls()

    @classmethod
    def gather(cls, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Return the records that rebuild modules, by path, given the records of a module and of all its submodules."""
        return dict(records)

    @classmethod
    def when_lost(cls, model: nn.Module, names: list[str]) -> str | None:
        """Return the warning for a load that has ignored the records of these modules; None for no warning."""
        return None

    @classmethod
    def when_refused(cls, model: nn.Module) -> str:
        """Return what to do where a strict load has failed, for a kind that renames."""
        return f"Use load_compressed with a new {type(model).__name__}, which rebuilds the saved network first."

    @classmethod
    def own_keys(cls, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the prefixes, within the module, of the names of tensors that an unchanged network lacks."""
        return ()

    def runs_as(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the ways in which training runs the module beside the module as it is: see `way_of`."""
        return ()

    def write(self, module: nn.Module) -> Mapping[str, Any] | None:
        """Return the record: plain values, from which `rebuild` changes another module alike; None if none is needed.

        A value that is a dict may have names of the module's tensors as its keys.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply write().")

    def check(self, module: nn.Module, record: Mapping[str, Any], arriving: Arriving) -> None:
        """Raise a RecordError unless `write` could have made this record for such a module; nothing changes."""
        raise NotImplementedError(f"{type(self).__name__} must supply check().")

    def rebuild(self, module: nn.Module, record: Mapping[str, Any] | None, arriving: Arriving) -> None:
        """Change the module as a checked record says; None: the state dict has no record of this kind for it."""
        raise NotImplementedError(f"{type(self).__name__} must supply rebuild().")

    def attach(self, module: nn.Module) -> list[Removable]:
        """Make the module's state dicts contain this record, and its loads rebuild the module."""
        hooks = _hooks_of(module) or _Hooks.of(module)
        hooks.structures = [*hooks.structures, self]
        return [_Handle(module, self)]

    def attach_once(self, module: nn.Module) -> None:
        """Attach it to a module, unless one of its class is attached there already."""
        if not any(type(one) is type(self) for one in structures(module)):
            self.attach(module)


def structures(module: nn.Module) -> list[Structure]:
    """Return the structures that are attached to a module itself."""
    hooks = _hooks_of(module)
    return [] if hooks is None else list(hooks.structures)


def ways_of(model: nn.Module) -> list[str]:
    """Return the names of all ways in which training runs parts of a model, beside those parts as they are."""
    found = (way for module in model.modules() for one in structures(module) for way in one.runs_as(module))
    return list(dict.fromkeys(found))


def detach(module: nn.Module, structure: Structure) -> None:
    """Detach a structure from a module; nothing happens if it is not attached."""
    _Handle(module, structure).remove()


def follows(model: nn.Module) -> bool:
    """Return whether loads into a model rebuild it from all records that come."""
    hooks = _hooks_of(model)
    return hooks is not None and hooks.follows


def follow(model: nn.Module) -> Removable:
    """Make loads into a model rebuild it from all records in the state dict, of every kind.

    Returns:
        A handle that undoes this, unless the model followed before.
    """
    hooks = _hooks_of(model) or _Hooks.of(model)
    before, hooks.follows = hooks.follows, True
    return _Handle(model, None, follows=before)


@contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """Make loads within the block rebuild a model, as `follow` does.

    Example:
        >>> from lightning_compress.quantization.input_grids import InputGrid, input_grids, quantize_inputs
        >>> net, fresh = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        >>> _ = quantize_inputs(net, {"0": InputGrid(0.5, 0, 8)})
        >>> with following(fresh):
        ...     fresh.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> input_grids(fresh)
        {'0': InputGrid(scale=0.5, zero_point=0, bits=8)}
    """
    handle = follow(model)
    try:
        yield
    finally:
        handle.remove()


class _Hooks:
    """The hook that writes the records of one module, and holds its structures for the hook that loads.

    Attributes:
        structures: The structures that are attached to the module.
        follows: Whether records of this module and its submodules attach structures that were not attached before.
    """

    def __init__(self) -> None:
        self.structures: list[Structure] = []
        self.follows = False

    @classmethod
    def of(cls, module: nn.Module) -> _Hooks:
        """Register the hooks that save and load on a module."""
        hooks = cls()
        module.register_state_dict_post_hook(hooks)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_OnLoad(hooks))  # type: ignore[no-untyped-call]
        return hooks

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
        for one in self.structures:
            if (record := one.write(module)) is not None:
                local_metadata.setdefault(KEY, {})[one.kind] = {"format": one.format} | {
                    field: _same_strings(value, state_dict) if isinstance(value, dict) else value
                    for field, value in record.items()
                }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {_NEXT: RemovableHandle.next_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickled network keeps the numbers of its hooks, which torch would give to other hooks in a new process.
        RemovableHandle.next_id = max(RemovableHandle.next_id, state[_NEXT])
        self.__dict__ |= {key: value for key, value in state.items() if key != _NEXT}


class _OnLoad:
    """The hook that checks the records in a state dict, and rebuilds the module before its tensors are loaded."""

    def __init__(self, hooks: _Hooks) -> None:
        self.hooks = hooks

    def __call__(
        self,
        module: nn.Module,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool = False,
        *rest: Any,
    ) -> None:
        own = {prefix.rstrip("."): local_metadata}
        whole = self.hooks.follows or module._modules  # else no submodule can have a record
        found = records(getattr(state_dict, "_metadata", own) if whole else own, prefix)
        arriving = Arriving(state_dict, prefix, bool(local_metadata), strict)
        with _structures_as_before_on_error(module), as_before_on_error(module):
            for kind in KINDS:  # in this order: a later kind applies to the network that earlier ones have rebuilt
                todo = self._found(module, kind, found.get(kind, {}))
                for one, layer, path, record in todo:
                    if record is not None:
                        one.check(layer, record, _within(arriving, path))
                for one, layer, path, record in todo:
                    one.rebuild(layer, record, _within(arriving, path))
                    if one not in structures(layer):
                        one.attach(layer)

    def _found(
        self, module: nn.Module, kind: str, given: Mapping[str, Mapping[str, Any]]
    ) -> list[tuple[Structure, nn.Module, str, Mapping[str, Any] | None]]:
        """Return what to check and rebuild: structure, module, path of the module, and its record."""
        here = [one for one in self.hooks.structures if one.kind == kind]
        below = _renaming(module, kind)
        if not here and not below and not (given and self.hooks.follows):
            return []
        gathered = kind_class(kind).gather(given) if given else {}
        found: list[tuple[Structure, nn.Module, str, Mapping[str, Any] | None]] = []
        if "" not in gathered or not self.hooks.follows:
            found += [(one, module, "", gathered.get("")) for one in here]
        for path, record in gathered.items() if self.hooks.follows else ():
            layer = _submodule(module, path, kind)
            those = [one for one in structures(layer) if one.kind == kind]
            if not any(isinstance(one, kind_class(kind)) for one in those):
                those.append(kind_class(kind).new(layer, path))
            found += [(one, layer, path, record) for one in those]
        rebuilt = {id(one) for one, *_ in found}
        found += [(one, layer, path, gathered.get(path)) for one, layer, path in below if id(one) not in rebuilt]
        return found


def _renaming(module: nn.Module, kind: str) -> list[tuple[Structure, nn.Module, str]]:
    """Return what renames tensors below a module: later kinds apply to the names that it gives them."""
    below = [(layer, path) for path, layer in module.named_modules() if path]
    return [
        (one, layer, path) for layer, path in below for one in structures(layer) if one.renames and one.kind == kind
    ]


def _same_strings(values: dict[Any, Any], state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """Use the state dict's own strings as keys: pickle writes one object once, but equal objects twice."""
    names = {name: name for name in state_dict if name in values}
    return {names.get(name, name): value for name, value in values.items()}


@contextmanager
def _structures_as_before_on_error(model: nn.Module) -> Iterator[None]:
    hooks = [found for module in model.modules() if (found := _hooks_of(module)) is not None]
    before = [(one, one.structures, [dict(vars(structure)) for structure in one.structures]) for one in hooks]
    try:
        yield
    except BaseException:
        for one, those, values in before:
            one.structures = those
            for structure, held in zip(those, values, strict=True):
                vars(structure).clear()
                vars(structure).update(held)
        raise


def _submodule(module: nn.Module, path: str, kind: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise RecordError(
            f"The record {kind!r} is of {path!r}, which {type(module).__name__} does not have."
        ) from error


def _within(arriving: Arriving, path: str) -> Arriving:
    if not path:
        return arriving
    name = f"{arriving.prefix}{path}"
    known = bool(getattr(arriving.state_dict, "_metadata", {}).get(name))
    return Arriving(arriving.state_dict, f"{name}.", known, arriving.strict)


def _hooks_of(module: nn.Module) -> _Hooks | None:
    return next((hook for hook in module._state_dict_hooks.values() if isinstance(hook, _Hooks)), None)


class _Handle:
    """Detaches a structure from a module, or makes it stop following; the last handle removes the hooks."""

    def __init__(self, module: nn.Module, structure: Structure | None, *, follows: bool = False) -> None:
        self._module = weakref.ref(module)
        self._structure = structure
        self._follows = follows

    def remove(self) -> None:
        """Detach the structure, or restore whether the module follows loads."""
        module = self._module()
        hooks = None if module is None else _hooks_of(module)
        if module is None or hooks is None:
            return
        if self._structure is None:
            hooks.follows = self._follows
        hooks.structures = [one for one in hooks.structures if one is not self._structure]
        if not hooks.structures and not hooks.follows:
            for held in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
                for key in [
                    key for key, one in held.items() if isinstance(getattr(one, "hook", one), _Hooks | _OnLoad)
                ]:
                    del held[key]
