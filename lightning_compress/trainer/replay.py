"""Run a user's step again with another output of the network: losses, metrics and logged numbers of an exit or width.

    real step             the network runs, and the module logs "val_acc"
    replay "exit1"        the same step, in which the network returns the first exit's logits, logs "exit1/val_acc"

A replay begins with the random states of the real step, so that what the step draws before it calls the network is the
same. It has metrics and plain attributes of its own, so that neither an accuracy nor a list of outputs mixes exits.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric, MetricCollection

from lightning_compress.trainer import rng
from lightning_compress.trainer.unwrap import SLOT, innermost

_MISSING = object()
_CONTAINERS = (list, dict, set, deque)
_PLAIN = (int, float, str, Tensor, *_CONTAINERS)
_OF_TORCH = {"training", "forward"}  # attributes that torch and Lightning set on every module


@dataclass
class Replica:
    """The metrics and plain attributes that the replays of one name have to themselves.

    Attributes:
        metrics: Copies of the module's metrics, by path.
        values: Attributes and buffers that a replay has changed, by path.
    """

    metrics: dict[str, Metric | MetricCollection] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, module: LightningModule) -> Replica:
        """Copy the metrics of a module, without what they have counted."""
        made = cls()
        for path, metric in _outer_metrics(innermost(module)):
            made.metrics[path] = copy.deepcopy(metric)
            made.metrics[path].reset()
        return made

    @property
    def has_results(self) -> bool:
        """Whether an epoch's end may have something to do with it."""
        return bool(self.metrics or self.values)


@dataclass(frozen=True)
class Before:
    """What a module held before its real step.

    Attributes:
        random: The random states of this process.
        values: Copies of its plain attributes, and of the buffers outside its network, by path.
        versions: The tensors of the batch, with how often each has been written to.
        places: Where attributes and buffers are kept: the dicts of the module, by path.
    """

    random: dict[str, Any]
    values: Mapping[str, Any]
    versions: tuple[tuple[Tensor, int], ...]
    places: Mapping[str, dict[str, Any]]

    @classmethod
    def of(cls, module: LightningModule, network: nn.Module, replicas: Iterable[Replica], batch: Any) -> Before:
        """Look at a module and its batch; the real step follows.

        Args:
            module: Whose step is to be replayed.
            network: The module within it that the replay does not run.
            replicas: What all of them have changed before is not copied again.
            batch: The step's arguments.
        """
        places = _places(innermost(module), network)
        values = _values(places)
        known = [one.values.keys() for one in replicas]
        copied = {name: _copied(one) for name, one in values.items() if not all(name in one for one in known)}
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and not leaf.is_inference()]
        return cls(rng.capture(), copied, tuple((one, one._version) for one in tensors), places)

    def check_batch(self, module: LightningModule) -> None:
        """Refuse a step that has changed its batch before it called the network: a replay would change it again.

        Raises:
            ValueError: It has.
        """
        for tensor, version in self.versions:
            if tensor._version != version:
                raise ValueError(
                    f"The step of {type(innermost(module)).__name__} changes a tensor of its batch in place (shape "
                    f"{tuple(tensor.shape)}) before it calls the network. The step is replayed on the same batch, "
                    f"where it would change the tensor again: write x = x.sub(m) instead of x.sub_(m)."
                )


@contextmanager
def replaying(module: LightningModule, label: str, replica: Replica, before: Before) -> Iterator[None]:
    """Give a module the random states of its real step, and a replica's metrics and attributes, for one replay.

    Afterwards all is as it was when the block began, and the replica holds what the replay has changed.

    Args:
        module: A wrapper, whose step the block runs.
        label: What is logged in the block gets it as a folder: "exit1/val_acc".
        replica: Of this label.
        before: What the module held before the real step.
    """
    own, inside = innermost(module), getattr(module, SLOT)
    after, was = rng.capture(), _values(before.places)
    rng.restore(before.random)
    given = {name: _copied(value) for name, value in before.values.items()} | replica.values
    fresh = {name: (one, _copied(one), _version(one)) for name, one in given.items() if name not in replica.values}
    _put(before.places, given)
    inside.label += f"{label}/"
    try:
        with _exchanged_metrics(own, replica):
            yield
        for name, value in _values(before.places).items():
            if name not in fresh or not _same(value, *fresh[name]):
                replica.values[name] = value
    finally:
        inside.label = inside.label.removesuffix(f"{label}/")
        _put(before.places, dict.fromkeys(_values(before.places).keys() - was.keys(), _MISSING) | was)
        rng.restore(after)


@contextmanager
def returning(network: nn.Module, output: Any) -> Iterator[None]:
    """Have calls of a network return `output`, without running it."""
    with answering(network, lambda *args, **kwargs: output):
        yield


@contextmanager
def answering(network: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have another function answer calls of a network."""
    held = {name: vars(network).get(name, _MISSING) for name in ("forward", "_compiled_call_impl")}
    vars(network).update({"forward": forward, "_compiled_call_impl": None})
    try:
        yield
    finally:
        for name, value in held.items():
            if value is _MISSING:
                del vars(network)[name]
            else:
                vars(network)[name] = value


def with_output(found: Any, output: str | int | None, new: Tensor, who: str) -> Any:
    """Return what a network returned, with another tensor in the place that `output` picks.

    Args:
        found: A tensor, or a dict, tuple, list or object; it stays as it is.
        output: As in `select_output`.
        new: The tensor to be there.
        who: Whose output it is, for the message.

    Raises:
        ValueError: The network has computed its loss from the other tensor already.

    Example:
        >>> import torch
        >>> with_output({"logits": torch.ones(1), "other": 2}, None, torch.zeros(1), "The network")
        {'logits': tensor([0.]), 'other': 2}
    """
    if isinstance(found, Tensor):
        return new
    loss = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    if isinstance(loss, Tensor):
        raise ValueError(
            f"{who} computes its loss itself, from the full network's logits, as networks of transformers do when they "
            f"get labels=: call it without labels, and compute the loss from its logits in the step."
        )
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    place = "logits" if output is None and isinstance(logits, Tensor) else output
    if isinstance(found, tuple) and isinstance(place, int):
        items = [*found[:place], new, *found[place:][1:]]
        return type(found)(*items) if hasattr(found, "_fields") else type(found)(items)
    made = copy.copy(found)
    if isinstance(made, Mapping | list):
        made[place] = new  # type: ignore[index]  # `select_output` has picked from there
    else:
        setattr(made, str(place), new)
    return made


# ---------------------------------------------------------------------- metrics


def _outer_metrics(own: nn.Module) -> Iterator[tuple[str, Metric | MetricCollection]]:
    """Metrics and collections that are in no other metric, by path."""
    for name, child in own.named_children():
        if isinstance(child, Metric | MetricCollection):
            yield name, child
        else:
            yield from ((f"{name}.{path}", metric) for path, metric in _outer_metrics(child))


@contextmanager
def _exchanged_metrics(own: nn.Module, replica: Replica) -> Iterator[None]:
    places = []
    for path, metric in replica.metrics.items():
        parent, _, name = path.rpartition(".")
        holder = own.get_submodule(parent)._modules
        real = holder[name]
        assert isinstance(real, Metric | MetricCollection)
        places.append((holder, name, real))
        holder[name] = metric.to(_device(real))
        metric.training = real.training
    try:
        yield
    finally:
        for holder, name, real in places:
            holder[name] = real


def _device(metric: Metric | MetricCollection) -> Any:
    if isinstance(metric, Metric):
        return metric.device
    return next(iter(metric.values(copy_state=False))).device


# ---------------------------------------------------------------------- plain attributes and buffers


def _places(own: LightningModule, network: nn.Module) -> dict[str, dict[str, Any]]:
    """The dict of the module's attributes, and those of the buffers outside network and metrics, by path."""
    found: dict[str, dict[str, Any]] = {"": vars(own)}
    todo: list[tuple[str, nn.Module]] = [(".", own)]
    while todo:
        path, holder = todo.pop()
        found[path] = holder._buffers
        if holder is not network:
            children = ((f"{path}{name}.", one) for name, one in holder.named_children())
            todo += [(name, one) for name, one in children if one is not network and not isinstance(one, Metric)]
    return {path: place for path, place in found.items() if place or path in ("", ".")}


def _values(places: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    attributes = {name: one for name, one in places[""].items() if name[0] != "_" and name not in _OF_TORCH}
    found = {name: one for name, one in attributes.items() if one is None or isinstance(one, _PLAIN)}
    for path, place in places.items():
        if path:
            found |= {f"{path}{name}": one for name, one in place.items()}
    return found


def _put(places: Mapping[str, dict[str, Any]], values: Mapping[str, Any]) -> None:
    for path, value in values.items():
        parent, dot, name = path.rpartition(".")
        place = places[parent + dot]
        if value is _MISSING:
            del place[name]
        else:
            place[name] = value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _same(now: Any, given: Any, copied: Any, version: int | None) -> bool:
    """Whether a replay has left a value as it was given to it; `copied` is a copy of before."""
    if now is not given:
        return not isinstance(now, (Tensor, *_CONTAINERS)) and type(now) is type(given) and bool(now == given)
    if isinstance(now, Tensor):
        return torch.equal(now, copied) if version is None else now._version == version
    if isinstance(now, dict):
        return now.keys() == copied.keys() and all(one is copied[name] for name, one in now.items())
    if isinstance(now, list | deque):
        return len(now) == len(copied) and all(a is b for a, b in zip(now, copied, strict=True))
    return bool(now == copied)


def traces(module: LightningModule, before: Before) -> list[Any]:
    """Return numbers that change when a hook of the module logs something, or touches metrics or what steps collect."""
    inside: Any = getattr(module, SLOT)
    metrics = [one.update_count for one in innermost(module).modules() if isinstance(one, Metric)]
    values = [
        (name, id(one), len(one) if isinstance(one, _CONTAINERS) else _version(one))
        for name, one in _values(before.places).items()
        if isinstance(one, (Tensor, *_CONTAINERS))
    ]
    return [inside.logged, metrics, values]
