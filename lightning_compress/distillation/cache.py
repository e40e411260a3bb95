"""Cache the outputs of a teacher in memory, by the index of each sample in its dataset.

    checksum = k_0 + sum over j of k_j w_j  mod 2^64        w: a sample's bytes, as 32-bit words; k: 64-bit random keys

Two different inputs have the same checksum with a probability of at most 2^-33 over the choice of the keys: some
difference of words, which is no multiple of 2^32, times its k_j would have to be one certain number. The checksums find
inputs that change from epoch to epoch, by random augmentation, for which the stored outputs would be wrong.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset


class OutputCache:
    """The outputs of a teacher, in main memory and in their own dtype; its `len` is the number of stored samples.

    Example:
        >>> teacher, cache = torch.nn.Linear(3, 2), OutputCache()
        >>> def outputs(index, x):
        ...     keys = checksums([x], len(x))
        ...     found = cache.lookup(index, keys)
        ...     if found is None:
        ...         found = teacher(x).detach()
        ...         cache.store(index, keys, found)
        ...     return found
        >>> data = torch.randn(100, 3)
        >>> for index in (torch.tensor([7, 42]), torch.tensor([42, 99]), torch.tensor([99, 7])):
        ...     assert torch.allclose(outputs(index, data[index]), teacher(data[index]))
        >>> len(cache)
        3
        >>> outputs(torch.tensor([42]), -data[[42]])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: The input of sample 42 is not the one ... Random augmentation changes the inputs: switch it off, ...
    """

    def __init__(self) -> None:
        self._row = torch.empty(0, dtype=torch.int64)  # the row of every index, -1 for an unknown one
        self._checksums = torch.empty(0, dtype=torch.int64)
        self._outputs = torch.empty(0)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def lookup(self, index: Tensor, checksums: Tensor) -> Tensor | None:
        """Return the stored outputs, on the checksums' device; None if a sample of the batch is unknown.

        Args:
            index: The samples' positions in their dataset, shape (N,).
            checksums: The checksums of their inputs, from the function `checksums`, shape (N,).

        Raises:
            ValueError: An input differs from the one stored for its index, or an index is not a whole number from 0 on.
        """
        index = self._checked(index, checksums)
        rows = self._row[index]
        known = rows >= 0
        self._compare(index[known], rows[known], checksums.cpu()[known])
        return self._outputs[rows].to(checksums.device) if known.all() else None

    def store(self, index: Tensor, checksums: Tensor, outputs: Tensor) -> None:
        """Store the outputs of the samples that are not stored yet.

        Args:
            index: As for `lookup`; it may contain a sample twice.
            checksums: As for `lookup`.
            outputs: The teacher's outputs, shape (N, ...).

        Raises:
            ValueError: As for `lookup`; or the outputs differ in shape or dtype from the stored ones.
        """
        index = self._checked(index, checksums)
        shape = outputs.shape[1:]
        if outputs.dim() == 0 or len(outputs) != len(index):
            raise ValueError(
                f"Outputs of shape {tuple(outputs.shape)} do not have one row for each of {len(index)} samples."
            )
        if self._size == 0:
            self._outputs = torch.empty(0, *shape, dtype=outputs.dtype)
        elif shape != self._outputs.shape[1:] or outputs.dtype != self._outputs.dtype:
            raise ValueError(
                f"The teacher's output for a sample has shape {tuple(shape)} and is {outputs.dtype}; those stored have "
                f"shape {tuple(self._outputs.shape[1:])} and are {self._outputs.dtype}. Pad all inputs to one size, or "
                "switch the cache off."
            )
        unknown = torch.unique(index[self._row[index] < 0])
        before, self._size = self._size, self._size + len(unknown)
        self._row[unknown] = torch.arange(before, self._size)
        self._checksums = _grown(self._checksums, self._size)
        self._outputs = _grown(self._outputs, self._size)
        rows = self._row[index]
        new = rows >= before
        self._checksums[rows[new]] = checksums.cpu()[new]
        self._outputs[rows[new]] = outputs.detach().cpu()[new]
        self._compare(index, rows, checksums.cpu())  # the batch may contain an index twice, with different inputs

    def _checked(self, index: Tensor, checksums: Tensor) -> Tensor:
        """Check an index, move it to the CPU, and make room for its samples."""
        if index.shape != checksums.shape or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"The index has shape {tuple(index.shape)} and is {index.dtype}; expected one whole number for each of "
                f"{len(checksums)} samples. Wrap the dataset in Indexed, which adds it to every sample."
            )
        index = index.cpu().long()
        if len(index) == 0:
            return index
        if index.min() < 0:
            raise ValueError(f"The index {int(index.min())} is negative; expected positions in the dataset.")
        beyond = int(index.max()) + 1 - len(self._row)
        if beyond > 0:
            self._row = F.pad(self._row, (0, max(beyond, len(self._row))), value=-1)
        return index

    def _compare(self, index: Tensor, rows: Tensor, checksums: Tensor) -> None:
        differ = self._checksums[rows] != checksums
        if differ.any():
            raise ValueError(
                f"The input of sample {int(index[differ][0])} is not the one that its teacher's outputs are stored for "
                f"({int(differ.sum())} of {len(index)} samples in the batch). Random augmentation changes the inputs: "
                "switch it off, or switch the cache off."
            )


def _grown(stored: Tensor, size: int) -> Tensor:
    if size <= len(stored):
        return stored
    return torch.cat([stored, stored.new_empty(max(size - len(stored), len(stored)), *stored.shape[1:])])


@torch.no_grad()
def checksums(inputs: Iterable[Tensor], n: int) -> Tensor:
    """Compute a 64-bit checksum of every sample, from all bytes of its inputs, their order, shapes and dtypes.

    Args:
        inputs: Inputs of the network. Those without n samples along their first dimension are ignored.
        n: The number of samples.

    Returns:
        A tensor of shape (n,), int64, on the device of the first input that is not ignored.

    Raises:
        ValueError: No input has n samples.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
        >>> a, b, c = checksums([x], 3).tolist()
        >>> a == c, a == b
        (True, False)
    """
    inputs = list(inputs)
    batched = [x for x in inputs if x.dim() > 0 and len(x) == n]
    if not batched:
        shapes = [tuple(x.shape) for x in inputs]
        raise ValueError(f"Inputs of shapes {shapes} hold no batch of {n} samples in their first dimension.")
    total = torch.zeros(n, dtype=torch.int64, device=batched[0].device)
    for position, x in enumerate(batched):
        words = _words(x)
        seed = zlib.crc32(f"{position} {x.dtype} {tuple(x.shape[1:])}".encode())
        keys = torch.randint(-(2**63), 2**63 - 1, (1 + words.shape[1],), generator=torch.Generator().manual_seed(seed))
        keys = keys.to(x.device, non_blocking=True)
        total += (keys[0] + (words * keys[1:]).sum(1)).to(total.device)
    return total


def _words(x: Tensor) -> Tensor:
    """View every sample's bytes as 32-bit words, the last one padded by zeros: shape (N, words)."""
    rows = x.clone(memory_format=torch.contiguous_format).view(len(x), math.prod(x.shape[1:])).view(torch.uint8)
    missing = -rows.shape[1] % 4
    return (F.pad(rows, (0, missing)) if missing else rows).view(torch.int32)


def without_index(batch: Any, where: str | int) -> tuple[Any, Tensor]:
    """Return a batch without the indices of its samples, and the indices.

    Raises:
        ValueError: There are no indices at that position or key.

    Example:
        >>> without_index([torch.zeros(2, 3), torch.tensor([1, 0]), torch.tensor([7, 8])], -1)[1]
        tensor([7, 8])
    """
    rest: Any
    try:
        if isinstance(batch, Mapping):
            rest, index = {key: value for key, value in batch.items() if key != where}, batch[where]
        else:
            rest = list(batch)
            index = rest.pop(where)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"index={where!r} names the indices of the samples in a training batch, but this one, a "
            f"{type(batch).__name__}, has nothing there: wrap the dataset in "
            f"lightning_compress.distillation.cache.Indexed(dataset), which adds them."
        ) from error
    if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point():
        raise ValueError(f"index={where!r} is no tensor of sample indices in the training batch, but {index!r}.")
    return (tuple(rest) if isinstance(batch, tuple) else rest), index


class Indexed(Dataset[Any]):
    """A dataset whose samples contain their index.

        (x, y) becomes (x, y, i)        {"x": x, "y": y} becomes {"x": x, "y": y, "index": i}        x becomes (x, i)

    Args:
        dataset: A map-style dataset.
        key: The key of the index in samples that are mappings.

    Raises:
        ValueError: The dataset is an IterableDataset; or, when a sample is read, it has the key already.

    Example:
        >>> dataset = Indexed(torch.utils.data.TensorDataset(torch.tensor([0.5, 0.7]), torch.tensor([3, 4])))
        >>> dataset[1], len(dataset)
        ((tensor(0.7000), tensor(4), 1), 2)
    """

    def __init__(self, dataset: Dataset[Any], *, key: str = "index") -> None:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"{type(dataset).__name__} is an IterableDataset, whose samples have no index: use a dataset with "
                f"__getitem__."
            )
        self.dataset = dataset
        self.key = key

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if isinstance(sample, Mapping):
            if self.key in sample:
                raise ValueError(f"Samples have a {self.key!r} already: give Indexed(dataset, key=...) another name.")
            return {**sample, self.key: index}
        return (*sample, index) if isinstance(sample, tuple | list) else (sample, index)
