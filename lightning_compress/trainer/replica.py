"""What the replays of a step have to themselves: metrics, and the attributes and buffers that steps change.

A replay must neither add to the module's own counters and metrics, nor begin with what the real step has left in them.
So each name of replays ("exit1") has a replica of the module's state, which lives on from step to step beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric, MetricCollection, MetricTracker

from lightning_compress.trainer import rng
from lightning_compress.trainer.attributes import copied, fingerprint, places_of, put, values_in
from lightning_compress.trainer.unwrap import SLOT, innermost

AnyMetric = Metric | MetricCollection | MetricTracker


@dataclass
class Replica:
    """The metrics and attributes that the replays of one name have to themselves.

    Attributes:
        metrics: Copies of the module's metrics, by path.
        values: What replays find in the module's attributes and buffers, by path.
        followed: The values that no step has changed so far, which are copies of the module's: by path the module's
            value, its fingerprint, and that of the copy. A name that is not among them is the replica's own.
    """

    metrics: dict[str, AnyMetric] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    followed: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: LightningModule) -> Replica:
        """Copy the metrics of a module, without what they have counted."""
        made = cls()
        for path, metric in metrics_in(innermost(module)):
            own = made.metrics[path] = copy.deepcopy(metric)
            if isinstance(own, MetricTracker):
                own.reset_all()
            else:
                own.reset()
        return made

    def own(self) -> dict[str, Any]:
        """Return the values that steps have changed."""
        return {path: value for path, value in self.values.items() if path not in self.followed}

    def follow(self, values: Mapping[str, Any], prints: Mapping[str, Any], own: LightningModule) -> None:
        """Copy what the module holds before a step, with these fingerprints, but for what is the replica's own."""
        known = {id(metric): self.metrics[path] for path, metric in metrics_in(own) if path in self.metrics}
        for path in self.followed.keys() - values.keys():
            del self.followed[path], self.values[path]
        for path, value in values.items():
            is_own = path in self.values and path not in self.followed
            source, was, _ = self.followed.get(path, (None, None, None))
            if not is_own and (path not in self.followed or source is not value or was != prints[path]):
                self.values[path] = copied(value, known)
                self.followed[path] = (value, prints[path], fingerprint(self.values[path]))

    def keep(self, paths: Iterable[str]) -> None:
        """Make these values the replica's own."""
        for path in paths:
            self.followed.pop(path, None)

    def after_replay(self, values: Mapping[str, Any]) -> None:
        """Take over what the module holds at a replay's end."""
        changed = {path for path, (_, _, was) in self.followed.items() if fingerprint(values.get(path)) != was}
        self.keep(changed)
        self.values = dict(values)


class Before:
    """What a module held before its real step, which replays begin with.

    Args:
        module: Whose step is to be replayed.
        network: The module within it that a replay does not run.
        replicas: Of all its replays.
        batch: The step's arguments.

    Attributes:
        random: The random states of this process.
        places: Where the module keeps attributes and buffers.
    """

    def __init__(
        self, module: LightningModule, network: nn.Module, replicas: Iterable[Replica], batch: Any = None
    ) -> None:
        own = innermost(module)
        self.random = rng.capture()
        self.places = places_of(own, network)
        self._replicas = list(replicas)
        self._kind = type(own).__name__
        self._values = values_in(self.places)
        self._known = set.intersection(*(set(one.own()) for one in self._replicas)) if self._replicas else set()
        self._prints = {path: fingerprint(one) for path, one in self._values.items() if path not in self._known}
        for replica in self._replicas:
            replica.follow(self._values, self._prints, own)
        self._batch = _same_tensors(batch)
        self._tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and not leaf.is_inference()]
        self.look_at_batch()

    def batch(self) -> Any:
        """Return the step's arguments as they were: the same tensors, in containers of before."""
        return _same_tensors(self._batch)

    def look_at_batch(self) -> None:
        """Remember how often each tensor of the batch has been written to."""
        self._versions = [one._version for one in self._tensors]

    def check_batch(self) -> None:
        """Refuse a step that has changed its batch in place since it was looked at: a replay would change it again.

        Raises:
            ValueError: It has.
        """
        for tensor, version in zip(self._tensors, self._versions, strict=True):
            if tensor._version != version:
                raise ValueError(
                    f"The step of {self._kind} changes a tensor of its batch in place (shape "
                    f"{tuple(tensor.shape)}). The step is replayed on the same batch, where it would change the tensor "
                    f"again: write x = x.sub(m) instead of x.sub_(m)."
                )

    def after_real_step(self) -> None:
        """Make what the real step has changed every replica's own, for its replays will change it as well."""
        now = values_in(self.places)
        changed = {path for path, value in self._values.items() if path not in now}
        new = {path: value for path, value in now.items() if path not in self._known}
        changed |= {path for path, value in new.items() if self._prints.get(path) != fingerprint(value)}
        for replica in self._replicas:
            replica.keep(changed)


def traces(module: LightningModule, before: Before, replicas: Iterable[Replica]) -> list[Any]:
    """Return what changes when a hook logs something, or touches metrics or what steps change."""
    own, values = innermost(module), values_in(before.places)
    counts = [one.update_count for one in own.modules() if isinstance(one, Metric)]
    names = sorted({path for replica in replicas for path in replica.own()})
    inside: Any = getattr(module, SLOT)
    return [inside.logged, counts, [fingerprint(values.get(path)) for path in names]]


def metrics_in(own: nn.Module) -> Iterator[tuple[str, AnyMetric]]:
    """Metrics, collections and trackers of a module that are in no other one, by path."""
    for name, child in own.named_children():
        if isinstance(child, AnyMetric):
            yield name, child
        else:
            yield from ((f"{name}.{path}", metric) for path, metric in metrics_in(child))


@contextmanager
def exchanged(own: LightningModule, before: Before, replica: Replica) -> Iterator[None]:
    """Have a module hold a replica's metrics and values while the block runs, and the replica what they have become."""
    was = values_in(before.places)
    put(before.places, replica.values)
    try:
        with _exchanged_metrics(own, replica):
            yield
        replica.after_replay(values_in(before.places))
    finally:
        put(before.places, was)


@contextmanager
def _exchanged_metrics(own: nn.Module, replica: Replica) -> Iterator[None]:
    places = []
    for path, metric in replica.metrics.items():
        parent, _, name = path.rpartition(".")
        holder = own.get_submodule(parent)._modules
        real = holder[name]
        assert isinstance(real, AnyMetric)
        places.append((holder, name, real))
        device = next((one.device for one in real.modules() if isinstance(one, Metric)), None)
        holder[name] = metric if device is None else metric.to(device)
        metric.training = real.training
    try:
        yield
    finally:
        for holder, name, real in places:
            holder[name] = real


def _same_tensors(batch: Any) -> Any:
    """Copy the containers of a batch, which a step may change, and not its tensors."""
    if isinstance(batch, tuple):
        items = [_same_tensors(one) for one in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if isinstance(batch, list):
        return [_same_tensors(one) for one in batch]
    if isinstance(batch, Mapping):
        made: Any = copy.copy(batch)
        try:
            made.update({name: _same_tensors(one) for name, one in batch.items()})
        except AttributeError:  # a mapping that nothing can be put into
            return batch
        return made
    return batch
