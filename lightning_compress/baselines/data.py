"""LightningDataModules that hold Digits, MNIST, Fashion-MNIST and CIFAR-10 in memory."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from lightning_compress.baselines.datamodule import ImageData, Samples, stratified_order
from lightning_compress.baselines.download import fetch
from lightning_compress.baselines.idx import parse_cifar10, read_idx, read_tar_members


class Digits(ImageData):
    """The 1,797 handwritten digits of 8x8 pixels and 17 grey levels that scikit-learn contains.

    The images are those of the test part of Alpaydin and Kaynak's Optical Recognition of Handwritten Digits.

    Args:
        batch_size: The size of a training batch, per rank.
        eval_batch_size: The size of a validation or test batch, per rank.
        val_size: The number of validation samples; with 0 there is no validation part.
        test_size: The number of test samples.
        shift: The largest random shift of training images in pixels; 0: images are not shifted.
        normalize: Whether pixels are standardised.
        drop_last: Whether training drops a last batch that is not full.
        seed: The seed of the training order and the augmentation.
        split_seed: The seed of the stratified split.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> data = Digits()
        >>> data.setup()
        >>> len(data.train_dataloader()), next(iter(data.test_dataloader()))[0].shape
        (20, torch.Size([360, 1, 8, 8]))
    """

    input_shape = (1, 8, 8)
    pixel_max = 16.0
    mean = (0.3053,)
    std = (0.3760,)

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        val_size: int = 180,
        test_size: int = 360,
        shift: int = 0,
        normalize: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            shift=shift,
            normalize=normalize,
            drop_last=drop_last,
            seed=seed,
            split_seed=split_seed,
        )
        self.test_size = test_size

    def read(self) -> tuple[Samples, Samples]:
        """Return the training part, validation included, and a stratified test part of `test_size` digits."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "Digits reads the digits of scikit-learn, which is not installed. Install it:"
                " pip install 'lightning-compress[demo]'."
            ) from error
        digits = load_digits()
        images, labels = torch.from_numpy(digits.images)[:, None], torch.from_numpy(digits.target).long()
        if not 0 < self.test_size < len(labels):
            raise ValueError(
                f"test_size must be from 1 to {len(labels) - 1:,} of the {len(labels):,} digits; got {self.test_size}."
            )
        order = stratified_order(labels, seed=self.split_seed)
        test, rest = order[: self.test_size], order[self.test_size :]
        return (images[rest], labels[rest]), (images[test], labels[test])


class ImageFiles(ImageData):
    """Base class of data sets in files, which are downloaded if they are missing.

    Args:
        root: The folder of the files.
        download: Whether one process per machine downloads missing files. A failed download leaves no partial file.
        batch_size: The size of a training batch, per rank.
        eval_batch_size: The size of a validation or test batch, per rank.
        val_size: The number of training samples that become the validation part; with 0 there is none.
        shift: The largest random shift of training images in pixels; 0: images are not shifted.
        flip: Whether training images are mirrored at random.
        normalize: Whether pixels are standardised.
        drop_last: Whether training drops a last batch that is not full.
        seed: The seed of the training order and the augmentation.
        split_seed: The seed of the stratified split.

    Raises:
        FileNotFoundError: Files are missing and `download` is False; the message names them and their source.
        ConnectionError: A download failed.
        ValueError: A file is corrupt; the message names it.
    """

    source: ClassVar[str]
    checksums: ClassVar[dict[str, str]]  # MD5 checksums of the downloads, by their name under `source`

    def __init__(
        self,
        root: str | Path = "data",
        *,
        download: bool = True,
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
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            shift=shift,
            flip=flip,
            normalize=normalize,
            drop_last=drop_last,
            seed=seed,
            split_seed=split_seed,
        )
        self.root = Path(root)
        self.download = download

    def missing(self) -> list[str]:
        """Return the names of the downloads whose content is missing in `root`."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Download missing files if `download` is True."""
        if self.download:
            for name in self.missing():
                fetch(self.source + name, self.root / name, md5=self.checksums[name])

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data, once for all stages."""
        if missing := self.missing():
            raise FileNotFoundError(
                f"{type(self).__name__} lacks {', '.join(missing)} in {self.root.absolute()}. Put the files there (they"
                f" come from {self.source}), set `root` to their folder, or let download=True fetch them."
            )
        super().setup(stage)


class MNIST(ImageFiles):
    """MNIST (LeCun, Cortes, Burges): 60,000 + 10,000 handwritten digits of 28x28, from four IDX files, plain or .gz.

    Arguments and errors are those of `ImageFiles`.
    """

    input_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)
    source = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    checksums: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }

    def missing(self) -> list[str]:
        """Return the names of the files that exist neither unpacked nor as .gz."""
        return [name for name in self.checksums if self._path(name) is None]

    def read(self) -> tuple[Samples, Samples]:
        """Return the training and the test part."""
        return self._read_part("train"), self._read_part("t10k")

    def _path(self, name: str) -> Path | None:
        candidates = [self.root / name.removesuffix(".gz"), self.root / name]
        return next((path for path in candidates if path.is_file()), None)

    def _read_part(self, part: str) -> Samples:
        image_path, label_path = self._path(f"{part}-images-idx3-ubyte.gz"), self._path(f"{part}-labels-idx1-ubyte.gz")
        assert image_path is not None
        assert label_path is not None
        images, labels = read_idx(image_path), read_idx(label_path).long()
        if images.shape[1:] != self.input_shape[1:] or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(
                f"{image_path} holds pixels of shape {tuple(images.shape)}, and {label_path} labels of shape"
                f" {tuple(labels.shape)}; expected N images of {self.input_shape[1]}x{self.input_shape[2]} and N"
                " labels. Remove the files, and download them again."
            )
        if len(labels) and (largest := int(labels.max())) >= self.num_classes:
            raise ValueError(
                f"{label_path} is corrupt: labels must be from 0 to {self.num_classes - 1}, and it has a {largest}."
                " Remove it, and download it again."
            )
        return images[:, None], labels


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): articles of clothing in MNIST's format and sizes.

    Arguments and errors are those of `ImageFiles`.
    """

    mean = (0.2860,)
    std = (0.3530,)
    source = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    checksums: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }


class CIFAR10(ImageFiles):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour photographs of 32x32, from the files of the binary version.

    The files are read from `root`, from `root`/cifar-10-batches-bin, or from within `root`/cifar-10-binary.tar.gz,
    which is not unpacked to disk. The images take 0.74 GB of memory. Arguments and errors are those of `ImageFiles`.
    """

    input_shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    source = "https://www.cs.toronto.edu/~kriz/"
    archive: ClassVar[str] = "cifar-10-binary.tar.gz"
    checksums: ClassVar[dict[str, str]] = {archive: "c32a1d4ab5d03f1284b67883e8d87530"}
    train_files: ClassVar[list[str]] = [f"data_batch_{i}.bin" for i in range(1, 6)]
    test_file: ClassVar[str] = "test_batch.bin"

    def missing(self) -> list[str]:
        """Return the archive's name if neither the archive nor its files exist."""
        return [] if self._folder() is not None or (self.root / self.archive).is_file() else [self.archive]

    def read(self) -> tuple[Samples, Samples]:
        """Return the training and the test part."""
        names = [*self.train_files, self.test_file]
        folder = self._folder()
        if folder is None:
            contents = read_tar_members(self.root / self.archive, names)
        else:
            contents = {name: (folder / name).read_bytes() for name in names}
        place = folder or self.root / self.archive
        parts = [parse_cifar10(contents.pop(name), name=str(place / name)) for name in names]
        train = torch.cat([images for images, _ in parts[:-1]]), torch.cat([labels for _, labels in parts[:-1]]).long()
        return train, (parts[-1][0], parts[-1][1].long())

    def _folder(self) -> Path | None:
        names = [*self.train_files, self.test_file]
        folders = [self.root, self.root / "cifar-10-batches-bin"]
        return next((folder for folder in folders if all((folder / name).is_file() for name in names)), None)
