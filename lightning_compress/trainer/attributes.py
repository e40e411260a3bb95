"""The plain state of a user's module beside its network: counters, lists, meters and buffers that its steps change."""

from __future__ import annotations

import copy
import pickle
import random
from collections import deque
from collections.abc import Mapping
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
_CONTAINERS = (list, dict, set, deque, tuple)
_SCALARS = (int, float, complex, str, bytes)
_MANY = 4096  # entries, beyond which a container is compared by its length, and an array by its identity
_DEPTH = 6  # of containers and objects within each other; what is deeper is shared
_OF_LIGHTNING = {*vars(LightningModule()), "_log_hyperparams", "_hparams", "_hparams_initial", "_hparams_name"}
_OF_TORCH = {"training", "forward"}
_LIBRARIES = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_compress", "builtins"}
_LIBRARIES |= {"functools", "numpy", "omegaconf", "transformers", "torchvision", "sklearn", "PIL"}
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


def copied(value: Any, known: Mapping[int, Any], depth: int = 0) -> Any:
    """Copy what a step may change: containers, tensors, metrics and plain objects of the user's own classes, nested.

    Args:
        value: What to copy. Modules, data sets, functions and objects of libraries are shared.
        known: Copies of what is in the module under a name too, by the identity of the original.
        depth: How deep within another value it is.
    """
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, nn.Parameter) or depth > _DEPTH:
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (Metric, MetricCollection, np.ndarray, *_GENERATORS)):
        return copy.deepcopy(value)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, tuple):
        items = [copied(one, known, depth + 1) for one in value]
        same = all(a is b for a, b in zip(items, value, strict=True))
        return value if same else type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict | list | deque | set):
        container: Any = copy.copy(value)
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if not isinstance(value, set):
                container[key] = copied(one, known, depth + 1)
        return container
    if _is_plain_object(value):
        made = copy.copy(value)
        if made is not value:
            vars(made).update({name: copied(one, known, depth + 1) for name, one in vars(value).items()})
        return made
    return value


def fingerprint(value: Any, depth: int = 0) -> Any:
    """Return something that is equal as long as neither the value nor anything in it that `copied` copies changes."""
    if value is None or isinstance(value, _SCALARS):
        return type(value), value if value == value else "nan"
    if isinstance(value, Tensor):
        if not value.is_inference():
            return id(value), value._version
        return id(value), value.shape, value.double().sum().item() if value.numel() <= _MANY else 0
    if isinstance(value, Metric):
        return id(value), value.update_count
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes() if value.size <= _MANY else 0
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().numpy().tobytes()
    if isinstance(value, _GENERATORS):
        return id(value), pickle.dumps(value)
    if depth > _DEPTH:
        return id(value)
    if isinstance(value, _CONTAINERS):
        if len(value) > _MANY:
            return id(value), len(value)
        keys = tuple(value) if isinstance(value, dict) else ()
        items = value.values() if isinstance(value, dict) else value
        return id(value), keys, tuple(fingerprint(one, depth + 1) for one in items)
    if isinstance(value, MetricCollection):
        return id(value), tuple(one.update_count for one in value.values(copy_state=False))
    if _is_plain_object(value):
        return id(value), tuple((name, fingerprint(one, depth + 1)) for name, one in vars(value).items())
    return id(value)


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a class of the user's, such as a meter, and not a module or a data set."""
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, *_BIG))
        and kind.__module__.partition(".")[0] not in _LIBRARIES
    )
