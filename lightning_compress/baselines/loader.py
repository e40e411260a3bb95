"""Batches from tensors in memory: no workers, no copies but the batch, an order that resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.trainer.distributed import rank, world_size

Augment = Callable[[Tensor, torch.Generator], Tensor]


class EpochSampler:
    """The order of one epoch's samples, drawn from (seed, epoch) alone.

    A resumed run therefore draws what the uninterrupted one would have drawn, whatever else used random numbers.
    Lightning calls `set_epoch` before every epoch; in a hand-written loop the loop has to.

    Args:
        size: Number of samples.
        shuffle: Whether to permute them anew each epoch.
        seed: Root of all permutations.

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
        """Say which epoch comes next."""
        self.epoch = epoch

    def order(self, epoch: int) -> Tensor:
        """Return the sample indices of an epoch in their order, a LongTensor of shape (size,)."""
        if not self.shuffle:
            return torch.arange(self.size)
        return torch.randperm(self.size, generator=_generator(self.seed, epoch))


class TensorLoader:
    """Iterate over (inputs, targets) batches that are picked from two tensors in memory.

    Stateful: `state_dict` has the epoch and the next batch, so that Lightning resumes in the middle of an epoch with
    the batch that comes next. Augmentation draws from (seed, epoch, batch, rank), so it resumes exactly too.

    Distributed: Lightning shards only a `DataLoader`, so this loader does it itself once `torch.distributed` is
    initialised. Rank r of R takes samples r, r + R, r + 2 R, ... of the epoch's order. With `even_ranks` the order is
    continued from its start until R divides it, as training needs: every rank then has the same number of batches of
    the same sizes. Without it each sample is seen exactly once and ranks may differ by one sample, as evaluation needs:
    sums over all ranks are those of one process.

    Args:
        inputs: Samples, of shape (N, ...), on any device.
        targets: Labels, of shape (N, ...), on the same device.
        batch_size: Samples per batch and rank.
        shuffle: Whether to permute the samples anew each epoch.
        seed: Root of the order and of the augmentation.
        drop_last: Whether to leave out a last batch that is not full.
        even_ranks: Whether to repeat up to R - 1 samples so that all ranks get equally many; None: if `shuffle`.
        augment: Called with a batch of inputs and a generator; returns the inputs to use.

    Raises:
        ValueError: `inputs` and `targets` differ in length, are empty or `batch_size` is not positive; a loaded state
            belongs to another loader.

    Example:
        >>> loader = TensorLoader(torch.arange(5.0), torch.arange(5), batch_size=2)
        >>> [targets.tolist() for _, targets in loader]
        [[0, 1], [2, 3], [4]]
    """

    batch_sampler = None  # where there is a `sampler`, Lightning reads this too

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
                f"TensorLoader needs one target per input and at least one sample;"
                f" got {len(inputs)} inputs and {len(targets)} targets."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.even_ranks = shuffle if even_ranks is None else even_ranks
        self.augment = augment
        self.sampler = EpochSampler(len(inputs), shuffle=shuffle, seed=seed)
        self._epoch = 0
        self._lag = 0  # epochs that the trainer counted and this loader did not
        self._next_batch = 0
        self._loaded: dict[str, int] | None = None

    def __len__(self) -> int:
        """Return the number of batches of this rank in one epoch."""
        share, rest = divmod(self.sampler.size, world_size())
        samples = share + ((rest > 0) if self.even_ranks else (rank() < rest))
        return samples // self.batch_size if self.drop_last else math.ceil(samples / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: nothing below runs before the first batch is asked for. Lightning creates a fit's first iterator
        # before it calls `set_epoch`.
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
        """Settle which epoch a new iterator goes through, and return the number of its first batch."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            # Resumed at the end of an epoch, a fit with `max_steps` counts an epoch that asks for no batch.
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
                f"The checkpoint was written in the middle of epoch {loaded['epoch']} by a loader with {found}; this"
                f" one has {expected}, so batch {loaded['next_batch']} is not the one that comes next. Resume with the"
                " settings of the checkpoint, or from the end of an epoch."
            )
        return loaded["next_batch"]

    def _identity(self) -> dict[str, int]:
        """What must be the same for a batch number to mean the same batch."""
        return {
            "samples": self.sampler.size,
            "batch_size": self.batch_size,
            "seed": self.sampler.seed,
            "ranks": world_size(),
        }

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of the batch that comes next, and what they refer to."""
        position = {"epoch": self._epoch, "lag": self._lag, "next_batch": self._next_batch}
        return self._loaded or position | self._identity()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iterator go on where `state` was taken, if it iterates over the same epoch."""
        self._loaded = dict(state)


class RandomShift:
    """Shift each image by up to `pixels` in both directions, uniformly; where it leaves a gap the border is repeated.

    Repeating keeps a constant background at its value, whatever the normalisation.

    Args:
        pixels: Largest shift.
        flip: Whether to mirror each image left to right, too, with probability 1/2.

    Shapes:
        input and output (N, C, H, W).

    Example:
        >>> images = torch.rand(2, 1, 8, 8)
        >>> RandomShift(1)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, pixels: int, *, flip: bool = False) -> None:
        if pixels < 0:
            raise ValueError(f"The largest shift is a number of pixels, 0 or more; got {pixels}.")
        self.pixels = pixels
        self.flip = flip

    def __call__(self, x_NCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Return the moved images; what is random comes from `generator`."""
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
    """Return a generator whose stream belongs to this key; unlike seed + epoch, no two keys share one."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed))
