"""Read a training batch, and restore the loader, the dataset and the random generators afterwards."""

from __future__ import annotations

import io
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress.trainer import rng

_LARGE = 1000  # entries: larger containers hold samples, which are not searched
_CLONED = 2**26  # bytes: larger orders of samples are not saved
_OPAQUE = (str, bytes, int, float, complex, type, FunctionType, ModuleType, nn.Module, Trainer, LightningDataModule)


def first_batch(trainer: Trainer) -> Any:
    """Return a batch of the fit's first training loader, and restore the loader and the random states.

    Raises:
        ValueError: The loader yields nothing, or would lose the batch.
    """
    batches = first_batches(trainer, 1)
    if not batches:
        kind = type(training_loaders(trainer)[0]).__name__
        raise ValueError(f"The training loader, a {kind}, yields no batch: pass example_inputs=.")
    return batches[0]


def first_batches(trainer: Trainer, number: int) -> list[Any]:
    """Return some batches of the fit's first training loader, or all that it has, and restore all as `first_batch`.

    Raises:
        ValueError: The loader would lose the batches.
    """
    random_states = rng.capture()
    try:
        loader = next(iter(training_loaders(trainer)))
        with untouched(loader):
            return list(islice(loader, number))
    finally:
        rng.restore(random_states)


def training_loaders(trainer: Trainer) -> list[Any]:
    """Return the fit's training loaders as a list, whatever collection the user has passed."""
    loaders = trainer.train_dataloader
    if loaders is None:  # the fit has not set them up yet
        loaders = trainer.fit_loop._data_source.dataloader()
    return list(CombinedLoader(loaders).flattened)


@contextmanager
def untouched(loader: Any) -> Iterator[None]:
    """Restore a loader, and the objects that it holds (dataset, samplers, generators), after a block.

    Raises:
        ValueError: It holds a Python iterator, such as a running generator, which can't be restored.
    """
    undo: list[Callable[[], Any]] = []
    seen: dict[int, Any] = {}
    left = deque([loader])
    while left:
        one = left.popleft()
        if one is None or isinstance(one, _OPAQUE) or id(one) in seen:
            continue
        seen[id(one)] = one
        step = _noted(one)
        if step is not None:
            undo.append(step)
        left += _held(one)
    if isinstance(loader, DataLoader):
        vars(loader)["_iterator"] = None  # not the iterator of persistent workers that an earlier fit has left
    try:
        yield
    finally:
        for step in undo:
            step()


def _held(one: Any) -> list[Any]:
    """Return the objects inside an object that may hold a state."""
    if isinstance(one, MethodType):
        return [one.__self__]
    if isinstance(one, partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, dict):
        return list(one.values()) if len(one) <= _LARGE else []
    if isinstance(one, list | tuple | set | frozenset | deque):
        return list(one) if len(one) <= _LARGE else []
    if isinstance(one, Tensor | np.ndarray):
        return []
    return [value for name, value in getattr(one, "__dict__", {}).items() if name != "_iterator"]


def _noted(one: Any) -> Callable[[], Any] | None:
    """Save an object's own state, and return a function that restores it; None if it has no state."""
    if isinstance(one, torch.Generator):
        return partial(one.set_state, one.get_state())
    if isinstance(one, random.Random):
        return partial(one.setstate, one.getstate())
    if isinstance(one, np.random.RandomState):
        return partial(one.set_state, one.get_state())
    if isinstance(one, np.random.Generator):
        return partial(setattr, one.bit_generator, "state", one.bit_generator.state)
    if isinstance(one, Tensor | np.ndarray):
        return _order_of(one)
    if isinstance(one, list | dict | set | deque):
        return partial(_refill, one, one.copy())
    if isinstance(one, io.IOBase):
        return partial(one.seek, one.tell()) if not one.closed and one.seekable() else None
    own = getattr(one, "__dict__", None)
    if isinstance(own, dict):
        return partial(_refill, own, own.copy())
    if isinstance(one, Iterator):
        raise ValueError(
            f"The training data come from a running {type(one).__name__}, and batches that are read from it before the "
            f"fit, to know what the network sees, would be lost: train with a DataLoader, or another iterable that "
            f"begins anew. Where only example inputs are wanted, example_inputs= replaces them, as does an "
            f"example_input_array of the LightningModule."
        )
    return None


def _order_of(one: Any) -> Callable[[], Any] | None:
    """Save a tensor or array of positions, which loaders shuffle in place; return a function that restores it."""
    if one.ndim != 1 or one.nbytes > _CLONED or isinstance(one, np.memmap):
        return None
    if isinstance(one, Tensor):
        return None if one.is_floating_point() or one.is_complex() else partial(one.copy_, one.clone())
    return partial(np.copyto, one, one.copy()) if one.dtype.kind in "iu" and one.flags.writeable else None


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        same = len(container) == len(content) and all(
            name in container and container[name] is value for name, value in content.items()
        )
    elif isinstance(container, set):
        same = container == content
    else:
        same = len(container) == len(content) and all(a is b for a, b in zip(container, content, strict=True))
    if same:
        return
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(content)
