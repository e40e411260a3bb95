"""The plain state of a user's module beside its network: counters, lists, meters and buffers that its steps change."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric, MetricCollection

MISSING = object()  # stands for an attribute that does not exist
Places = Mapping[str, dict[str, Any]]
_SCALARS = (int, float, complex, str, bytes)
_MANY = 1024  # parts of a value that are looked at; of what is beyond, a container is compared by its length
_DEPTH = 6  # of containers and objects within each other; what is deeper is shared
_OF_LIGHTNING = {*vars(LightningModule()), "_log_hyperparams", "_hparams", "_hparams_initial", "_hparams_name"}
_OF_TORCH = {"training", "forward"}
_LIBRARIES = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_compress"}
_LIBRARIES |= {"numpy", "omegaconf", "transformers", "torchvision", "sklearn", "PIL", *sys.stdlib_module_names}
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_BIG = (nn.Module, Dataset, DataLoader, Sampler, LightningDataModule, Callback, Logger, torch.optim.Optimizer)


def places_of(own: LightningModule, network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return where a module keeps its state, by path: "" its attributes, "." its buffers, ".loss." those of a child.

    Args:
        own: The user's module.
        network: The module within it, or itself, whose children have no place.
    """
    found: dict[str, dict[str, Any]] = {"": vars(own)}
    todo: list[tuple[str, nn.Module]] = [(".", own)]
    while todo:
        path, holder = todo.pop()
        found[path] = holder._buffers
        if holder is not network:
            children = ((f"{path}{name}.", one) for name, one in holder.named_children())
            todo += [(name, one) for name, one in children if one is not network and not isinstance(one, Metric)]
    return {path: place for path, place in found.items() if place or path in ("", ".")}


def values_in(places: Places) -> dict[str, Any]:
    """Return the attributes and buffers in these places, by path; not those of torch and Lightning."""
    found = {name: one for name, one in places[""].items() if name not in _OF_LIGHTNING and name not in _OF_TORCH}
    for path, place in places.items():
        if path:
            found |= {f"{path}{name}": one for name, one in place.items()}
    return found


def put(places: Places, values: Mapping[str, Any]) -> None:
    """Make the places hold exactly these values."""
    for path in values_in(places).keys() - values.keys():
        place, name = _at(places, path)
        del place[name]
    for path, value in values.items():
        place, name = _at(places, path)
        place[name] = value


def _at(places: Places, path: str) -> tuple[dict[str, Any], str]:
    parent, dot, name = path.rpartition(".")
    return places[parent + dot], name


def copied(value: Any, known: Mapping[int, Any]) -> Any:
    """Copy what a step may change: containers, tensors, metrics and plain objects of the user's own classes, nested.

    Args:
        value: What to copy. Modules, data sets, functions and objects of libraries are shared.
        known: Copies of what is in the module under a name too, by the identity of the original.
    """
    return _Walk().copied(value, known, 0)


def fingerprint(value: Any) -> Any:
    """Return something that is equal as long as neither the value nor anything in it that `copied` copies changes."""
    return _Walk().fingerprint(value, 0)


class _Walk:
    """A walk through one value, in which both functions see the same parts, and no more than a thousand of them."""

    def __init__(self) -> None:
        self.left = _MANY

    def _parts(self, value: Any, depth: int) -> list[tuple[Any, Any]] | None:
        """Return the parts of a container or plain object, by key; None if it has none that may be looked at."""
        parts: Iterable[tuple[Any, Any]]
        if isinstance(value, dict):
            parts = value.items()
        elif isinstance(value, list | deque | tuple):
            parts = enumerate(value)
        elif isinstance(value, set):
            parts = ((one, None) for one in value)
        elif _is_plain_object(value):
            value = vars(value)
            parts = value.items()
        else:
            return None
        if depth > _DEPTH or len(value) > self.left:
            return None
        self.left -= len(value)
        return list(parts)

    def copied(self, value: Any, known: Mapping[int, Any], depth: int) -> Any:
        if id(value) in known:
            return known[id(value)]
        if isinstance(value, Tensor):
            return value if isinstance(value, nn.Parameter) else value.detach().clone()
        if isinstance(value, (Metric, MetricCollection, np.ndarray, *_GENERATORS)):
            return copy.deepcopy(value)
        if isinstance(value, torch.Generator):
            return value.clone_state()
        parts = self._parts(value, depth)
        if parts is None:
            return copy.copy(value) if isinstance(value, dict | list | deque | set) else value
        made: Any = [self.copied(part, known, depth + 1) for _, part in parts]
        if isinstance(value, tuple):
            same = all(one is part for one, (_, part) in zip(made, parts, strict=True))
            return value if same else type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        other: Any = copy.copy(value)
        if other is not value and not isinstance(value, set):
            table = other if isinstance(value, dict | list | deque) else vars(other)
            for (key, _), one in zip(parts, made, strict=True):
                table[key] = one
        return other

    def fingerprint(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, _SCALARS):
            return type(value), value if value == value else "nan"
        found: Any = None
        if isinstance(value, Tensor):
            found = _version(value)
        elif isinstance(value, Metric):
            found = value.update_count
        elif isinstance(value, MetricCollection):
            found = tuple(one.update_count for one in value.values(copy_state=False))
        elif isinstance(value, np.ndarray):
            found = value.tobytes() if value.size <= _MANY and value.dtype != object else None
        elif isinstance(value, torch.Generator):
            found = value.get_state().numpy().tobytes()
        elif isinstance(value, _GENERATORS):
            found = pickle.dumps(value)
        elif (parts := self._parts(value, depth)) is not None:
            found = [(_name(key), self.fingerprint(part, depth + 1)) for key, part in parts]
        elif isinstance(value, dict | list | deque | set):
            found = len(value)
        return id(value), found


def _version(tensor: Tensor) -> Any:
    if not tensor.is_inference():
        return tensor._version
    return tensor.double().sum().item() if tensor.numel() <= _MANY else None


def _name(key: Any) -> Any:
    return key if isinstance(key, _SCALARS) else id(key)


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a class of the user's, such as a meter, and not a module or a data set."""
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, *_BIG))
        and kind.__module__.partition(".")[0] not in _LIBRARIES
    )
