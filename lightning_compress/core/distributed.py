"""Communication between ranks. With a single process, every function returns its argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process, 0 for a single one."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum the tensor over all ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Take the maximum of the tensor over all ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Give every rank the values of rank 0, in place, and return the tensor."""
    if world_size() > 1:
        dist.broadcast(tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor, src=0)
    return tensor


def barrier() -> None:
    """Wait until every rank has called this function."""
    if world_size() > 1:
        dist.barrier()


def gather(value: T) -> list[T]:
    """Return every rank's value, on every rank, ordered by rank."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """Return rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    values: list[T] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run an action on every rank, and return its result; if it raises on one rank, raise on all, so that none waits.

    Raises:
        ValueError: The action raised on another rank, whose error it quotes.
    """
    if world_size() == 1:
        return action()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    said = gather(None if failure is None else str(failure))
    first = next((number for number, one in enumerate(said) if one is not None), None)
    if first is None:
        return result  # type: ignore[return-value]
    if failure is not None and said[rank()] == said[first]:
        raise failure
    raise ValueError(f"Rank {first}: {said[first]}") from failure
