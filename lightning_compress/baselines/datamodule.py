"""The base class of the data sets: a stratified split, normalisation, and loaders that resume exactly."""

from __future__ import annotations

from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_compress.baselines.loader import RandomShift, TensorLoader
from lightning_compress.core.given import whole_number

Samples = tuple[Tensor, Tensor]  # images (N, C, H, W), labels (N,)


def stratified_order(labels: Tensor, *, seed: int) -> Tensor:
    """Return a random order of the samples in which every interval has nearly the overall shares of the classes.

    The samples of each class are shuffled, and sample i of n is placed at (i + 1/2) / n. So the first samples are a
    stratified random sample of any size, and the others are one as well.

    Args:
        labels: The classes, counted from 0, of shape (N,).
        seed: The seed of the order.

    Returns:
        A permutation of 0..N-1.

    Example:
        >>> labels = torch.tensor([0] * 8 + [1] * 4)
        >>> labels[stratified_order(labels, seed=0)[:3]].bincount()
        tensor([2, 1])
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = labels[shuffled]
    counts = classes.bincount()
    by_class = classes.argsort(stable=True)
    position = torch.empty_like(by_class)
    position[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[classes[by_class]]
    return shuffled[((position + 0.5) / counts[classes]).argsort(stable=True)]


class ImageData(LightningDataModule):
    """Base class of the data sets: normalisation, a fixed stratified validation part, and loaders that resume exactly.

    A subclass implements `read`. Pixels are scaled to 0..1 and, with `normalize`, standardised with the published mean
    and standard deviation of each channel. All samples stay in memory as float32.

    Args:
        batch_size: The size of a training batch, per rank.
        eval_batch_size: The size of a validation or test batch, per rank.
        val_size: The number of training samples that become the validation part; with 0 there is none.
        shift: The largest random shift of training images in pixels; 0: images are not shifted.
        flip: Whether training images are mirrored at random.
        normalize: Whether pixels are standardised.
        drop_last: Whether training drops a last batch that is not full.
        seed: The seed of the training order and the augmentation.
        split_seed: The seed of the split, which should be the same for all seeds of a comparison.
    """

    num_classes: ClassVar[int] = 10
    input_shape: ClassVar[tuple[int, int, int]]
    pixel_max: ClassVar[float] = 255.0
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_size: int = 5000,
        shift: int = 0,
        flip: bool = False,
        normalize: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            whole_number(size, f"{name} is a number of samples, 1 or more", least=1)
        for name, size in (("val_size", val_size), ("shift", shift)):
            whole_number(size, f"{name} must be a whole number, 0 or more", least=0)
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.augment = RandomShift(shift, flip=flip) if shift or flip else None
        self.normalize = normalize
        self.drop_last = drop_last
        self.seed = seed
        self.split_seed = split_seed
        self._train: Samples | None = None
        self._val: Samples | None = None
        self._test: Samples | None = None

    def read(self) -> tuple[Samples, Samples]:
        """Return the training part, validation included, and the test part; pixels from 0 to `pixel_max`."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data, once for all stages."""
        if self._train is not None:
            return
        (images, labels), (test_images, test_labels) = self.read()
        if not 0 <= self.val_size < len(labels):
            raise ValueError(
                f"val_size must be from 0 to {len(labels) - 1:,} of the {len(labels):,} training samples of"
                f" {type(self).__name__}; got {self.val_size}."
            )
        images, order = self._prepare(images), stratified_order(labels, seed=self.split_seed)
        val, train = order[: self.val_size], order[self.val_size :].sort().values
        self._train = images[train], labels[train]
        self._val = images[val], labels[val]
        self._test = self._prepare(test_images), test_labels

    def _prepare(self, images: Tensor) -> Tensor:
        x_NCHW = images.to(torch.float32, copy=True).div_(self.pixel_max)
        if not self.normalize:
            return x_NCHW
        return x_NCHW.sub_(torch.tensor(self.mean).view(-1, 1, 1)).div_(torch.tensor(self.std).view(-1, 1, 1))

    def train_dataloader(self) -> TensorLoader:
        """Return shuffled, augmented training batches, the same number on every rank."""
        assert self._train is not None, "setup has not run"
        return TensorLoader(
            *self._train,
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            drop_last=self.drop_last,
            augment=self.augment,
        )

    def val_dataloader(self) -> TensorLoader | list[TensorLoader]:
        """Return the validation batches, each sample on one rank; an empty list if there is no validation part."""
        assert self._val is not None, "setup has not run"
        return TensorLoader(*self._val, batch_size=self.eval_batch_size) if self.val_size else []

    def test_dataloader(self) -> TensorLoader:
        """Return the test batches, each sample on one rank."""
        assert self._test is not None, "setup has not run"
        return TensorLoader(*self._test, batch_size=self.eval_batch_size)

    def predict_dataloader(self) -> TensorLoader:
        """Return the test batches."""
        return self.test_dataloader()
