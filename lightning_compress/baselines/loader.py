"""A loader of batches from tensors in memory, which needs no workers and resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.core.distributed import rank, world_size

Augment = Callable[[Tensor, torch.Generator], Tensor]


class EpochSampler:
    """The order of the samples of an epoch, which depends only on the seed and the epoch.

    A resumed run therefore has the order of the uninterrupted run, whatever else uses random numbers. Lightning calls
    `set_epoch` before every epoch; a hand-written loop must call it as well.

    Args:
        size: The number of samples.
        shuffle: Whether each epoch has a new random order.
        seed: The seed of all orders.

    Example:
        >>> sampler = EpochSampler(4, shuffle=True, seed=0)
        >>> bool((sampler.order(3) == sampler.order(3)).all())
        True
    """

    def __init__(self, size: int, *, shuffle: bool = False, seed: int = 0) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch."""
        self.epoch = epoch

    def order(self, epoch: int) -> Tensor:
        """Return the sample indices of an epoch in their order, a LongTensor of shape (size,)."""
        if not self.shuffle:
            return torch.arange(self.size)
        return torch.randperm(self.size, generator=_generator(self.seed, epoch))


class TensorLoader:
    """Iterates over batches (inputs, targets) of two tensors in memory.

    The loader is stateful: its `state_dict` contains the epoch and the number of the next batch, so Lightning resumes
    an epoch in its middle with this batch. The random numbers of the augmentation depend only on (seed, epoch, batch,
    rank), so they resume exactly as well.

    The loader shards the samples itself if `torch.distributed` is initialised, because Lightning shards only a
    `DataLoader`. Rank r of R ranks takes samples r, r + R, r + 2 R, ... of the epoch's order. With `even_ranks` the
    first samples are repeated at the end until R divides the number of samples. Then all ranks have batches of the same
    number and sizes, as training needs it. Without `even_ranks` each sample is used exactly once, and ranks may differ
    by one sample. Then sums over all ranks equal those of one process, as evaluation needs it.

    Args:
        inputs: The samples, of shape (N, ...), on any device.
        targets: The labels, of shape (N, ...), on the same device.
        batch_size: The number of samples per batch and rank.
        shuffle: Whether each epoch has a new random order.
        seed: The seed of the order and of the augmentation.
        drop_last: Whether a last batch that is not full is dropped.
        even_ranks: Whether up to R - 1 samples are repeated so that all ranks have equally many; None: as `shuffle`.
        augment: A function that gets a batch of inputs and a generator, and returns the inputs to use.

    Raises:
        ValueError: `inputs` and `targets` are empty or differ in length, or `batch_size` is below 1. Later: a loaded
            state was saved by a loader with other settings.

    Example:
        >>> loader = TensorLoader(torch.arange(5.0), torch.arange(5), batch_size=2)
        >>> [targets.tolist() for _, targets in loader]
        [[0, 1], [2, 3], [4]]
    """

    batch_sampler = None  # Lightning reads this attribute of loaders with a `sampler`

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        even_ranks: bool | None = None,
        augment: Augment | None = None,
    ) -> None:
        if len(inputs) != len(targets) or len(inputs) == 0:
            raise ValueError(
                f"TensorLoader needs one target per input, and at least one sample;"
                f" got {len(inputs)} inputs and {len(targets)} targets."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size of TensorLoader must be at least 1; got {batch_size}.")
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.even_ranks = shuffle if even_ranks is None else even_ranks
        self.augment = augment
        self.sampler = EpochSampler(len(inputs), shuffle=shuffle, seed=seed)
        self._epoch = 0
        self._lag = 0  # number of epochs that the trainer counted but that asked for no batch
        self._next_batch = 0
        self._loaded: dict[str, int] | None = None

    def __len__(self) -> int:
        """Return the number of batches of this rank in one epoch."""
        share, rest = divmod(self.sampler.size, world_size())
        samples = share + ((rest > 0) if self.even_ranks else (rank() < rest))
        return samples // self.batch_size if self.drop_last else math.ceil(samples / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # This method must be a generator, whose code runs only when the first batch is requested: Lightning creates the
        # first iterator of a fit before it calls `set_epoch`.
        start = self._begin()
        order = self._rank_order().to(self.inputs.device)
        for batch in range(start, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            inputs = self.inputs.index_select(0, index)
            if self.augment is not None:
                inputs = self.augment(inputs, _generator(self.sampler.seed, self._epoch, batch, rank()))
            self._loaded = None
            self._next_batch = batch + 1
            yield inputs, self.targets.index_select(0, index)

    def _rank_order(self) -> Tensor:
        order = self.sampler.order(self._epoch)
        if self.even_ranks:
            order = order[torch.arange(math.ceil(len(order) / world_size()) * world_size()) % len(order)]
        return order[rank() :: world_size()]

    def _begin(self) -> int:
        """Set the epoch of a new iterator, and return the number of its first batch."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            # A fit with `max_steps` that resumes at the end of an epoch counts one epoch without a batch.
            self._lag = loaded["lag"] + (self.sampler.epoch - loaded["lag"] == loaded["epoch"] + 2)
        elif self.sampler.epoch == 0:  # a new fit
            self._lag = 0
        self._epoch = self.sampler.epoch - self._lag
        if loaded is None or loaded["epoch"] != self._epoch:
            return 0
        expected = self._identity()
        if any(loaded[key] != value for key, value in expected.items()):
            found = {key: loaded[key] for key in expected}
            raise ValueError(
                f"The checkpoint was written in the middle of epoch {loaded['epoch']} by a TensorLoader with {found};"
                f" this one has {expected}, so its batch {loaded['next_batch']} is not the next one. Resume with the"
                " settings of the checkpoint, or from a checkpoint of the end of an epoch."
            )
        return loaded["next_batch"]

    def _identity(self) -> dict[str, int]:
        """Return the settings that determine which samples a batch number stands for."""
        return {
            "samples": self.sampler.size,
            "batch_size": self.batch_size,
            "seed": self.sampler.seed,
            "ranks": world_size(),
        }

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of the next batch, and the settings that determine this batch."""
        position = {"epoch": self._epoch, "lag": self._lag, "next_batch": self._next_batch}
        return self._loaded or position | self._identity()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iterator start at the batch of `state`, if it iterates over the same epoch."""
        self._loaded = dict(state)


class RandomShift:
    """Shifts each image by up to `pixels` in both directions, uniformly, and fills gaps by repeating the border.

    Repeating the border keeps a constant background constant, whatever the normalisation.

    Args:
        pixels: The largest shift, in pixels.
        flip: Whether each image is also mirrored left to right with probability 1/2.

    Shapes:
        input and output (N, C, H, W).

    Example:
        >>> images = torch.rand(2, 1, 8, 8)
        >>> RandomShift(1)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, pixels: int, *, flip: bool = False) -> None:
        if pixels < 0:
            raise ValueError(f"pixels of RandomShift must be at least 0; got {pixels}.")
        self.pixels = pixels
        self.flip = flip

    def __call__(self, x_NCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Return the shifted images; all random numbers come from `generator`."""
        n, _, height, width = x_NCHW.shape
        padded = F.pad(x_NCHW, (self.pixels,) * 4, mode="replicate")
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, shifts, shifts, H, W), a view
        dy, dx = torch.randint(2 * self.pixels + 1, (2, n), generator=generator)
        shifted = windows[torch.arange(n), :, dy, dx]
        if not self.flip:
            return shifted
        mirror = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        return torch.where(mirror.to(shifted.device), shifted.flip(3), shifted)


def _generator(*key: int) -> torch.Generator:
    """Return a generator that depends on all numbers of the key; with seed + epoch, different keys would share one."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed))
