from __future__ import annotations

import gzip
import hashlib
import io
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from support.small import quiet_trainer
from torch import Tensor

from lightning_compress.baselines import CIFAR10, MNIST, Classifier, Digits, DigitsConvNet, FashionMNIST
from lightning_compress.baselines.datamodule import ImageData, stratified_order

MNIST_NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, *, packed: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = [(40, 28, 28), (40,), (12, 28, 28), (12,)]
    arrays = {}
    for name, shape in zip(MNIST_NAMES, shapes, strict=True):
        arrays[name] = random.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8)
        content = idx(arrays[name])
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return arrays


def write_cifar(folder: Path) -> np.ndarray:
    images = np.random.default_rng(1).integers(0, 256, (6, 4, 3, 32, 32), dtype=np.uint8)
    for name, part in zip([*CIFAR10.train_files, CIFAR10.test_file], images, strict=True):
        (folder / name).write_bytes(b"".join(bytes([i]) + image.tobytes() for i, image in enumerate(part)))
    return images


def everything(data: ImageData, part: str) -> tuple[Tensor, Tensor]:
    batches = list(getattr(data, f"{part}_dataloader")())
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def rows(images: Tensor | np.ndarray) -> list[bytes]:
    return sorted(np.asarray(image, dtype=np.float32).tobytes() for image in images)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dataset", [MNIST, FashionMNIST])
def test_idx_files_become_train_val_and_test(tmp_path: Path, dataset: type[MNIST], packed: bool) -> None:
    arrays = write_mnist(tmp_path, packed=packed)
    data = dataset(tmp_path, val_size=10, batch_size=7, normalize=False, download=False)
    data.prepare_data()
    data.setup()
    (train, train_labels), (val, _), (test, labels) = (everything(data, part) for part in ("train", "val", "test"))
    assert train.shape == (30, 1, 28, 28)
    assert rows(torch.cat([train, val])) == rows(arrays[MNIST_NAMES[0]][:, None] / np.float32(255))
    assert rows(test) == rows(arrays[MNIST_NAMES[2]][:, None] / np.float32(255))
    assert labels.tolist() == arrays[MNIST_NAMES[3]].tolist()
    label_of = {image.tobytes(): int(y) for image, y in zip(*(arrays[n] for n in MNIST_NAMES[:2]), strict=True)}
    for image, label in zip(train, train_labels, strict=True):
        assert label_of[(image[0] * 255).round().to(torch.uint8).numpy().tobytes()] == label


def test_normalize_uses_the_published_constants(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path)
    data = MNIST(tmp_path, val_size=10)
    data.setup()
    expected = (arrays[MNIST_NAMES[2]].astype(np.float64) / 255 - 0.1307) / 0.3081
    assert np.allclose(everything(data, "test")[0][:, 0].numpy(), expected, atol=1e-5)


def test_missing_files_are_named_with_their_folder_and_source(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / MNIST_NAMES[1]).unlink()
    data = MNIST(tmp_path, val_size=10, download=False)
    data.prepare_data()
    with pytest.raises(FileNotFoundError) as caught:
        data.setup()
    message = str(caught.value)
    assert "train-labels-idx1-ubyte.gz" in message
    assert "train-images" not in message
    assert str(tmp_path) in message
    assert MNIST.source in message


def test_images_and_labels_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / MNIST_NAMES[1]).write_bytes(idx(np.zeros(39)))
    with pytest.raises(ValueError, match=r"train-images.*\(40, 28, 28\).*train-labels.*\(39,\)"):
        MNIST(tmp_path, val_size=10).setup()
    (tmp_path / MNIST_NAMES[1]).write_bytes(idx(np.full(40, 12)))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte is corrupt.*has a 12"):
        MNIST(tmp_path, val_size=10).setup()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the data set's site."""
    site = tmp_path / "site"
    site.mkdir()
    write_mnist(site, packed=True)
    monkeypatch.setattr(MNIST, "source", site.as_uri() + "/")
    sums = {name: hashlib.md5((site / name).read_bytes()).hexdigest() for name in MNIST.checksums}
    monkeypatch.setattr(MNIST, "checksums", sums)
    return site


def test_what_is_missing_is_downloaded_once(tmp_path: Path, published: Path) -> None:
    data = MNIST(tmp_path / "new" / "folder", val_size=10)
    data.prepare_data()
    data.setup()
    assert sorted(path.name for path in data.root.iterdir()) == sorted(MNIST.checksums)
    for path in published.iterdir():
        path.unlink()
    data.prepare_data()  # nothing is missing: the site is not asked


def test_a_damaged_download_leaves_nothing(tmp_path: Path, published: Path) -> None:
    (published / "train-images-idx3-ubyte.gz").write_bytes(b"half")
    data = MNIST(tmp_path / "new", val_size=10)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz has the MD5 checksum \w+, expected"):
        data.prepare_data()
    assert list(data.root.iterdir()) == []


def test_no_network_is_one_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "source", "http://127.0.0.1:9/")  # nobody listens there
    data = MNIST(tmp_path / "new", val_size=10)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/train-images-idx3-ubyte\.gz .* put train-images"):
        data.prepare_data()
    assert list(data.root.iterdir()) == []


@pytest.mark.parametrize("place", ["root", "folder", "archive"])
def test_cifar10_is_read_from_wherever_its_files_are(tmp_path: Path, place: str) -> None:
    folder = tmp_path if place == "root" else tmp_path / "cifar-10-batches-bin"
    folder.mkdir(exist_ok=True)
    images = write_cifar(folder)
    if place == "archive":
        with tarfile.open(tmp_path / CIFAR10.archive, "w:gz") as archive:
            for path in sorted(folder.iterdir()):
                archive.addfile(
                    archive.gettarinfo(str(path), f"cifar-10-batches-bin/{path.name}"), io.BytesIO(path.read_bytes())
                )
                path.unlink()
    data = CIFAR10(tmp_path, val_size=4, normalize=False, download=False)
    data.setup()
    train, val, (test, labels) = everything(data, "train")[0], everything(data, "val")[0], everything(data, "test")
    assert rows(torch.cat([train, val])) == rows(images[:5].reshape(20, 3, 32, 32) / np.float32(255))
    assert rows(test) == rows(images[5] / np.float32(255))
    assert labels.tolist() == [0, 1, 2, 3]


def test_a_truncated_cifar_file_is_named_with_its_path(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path} is truncated"):
        CIFAR10(tmp_path, val_size=4).setup()


def test_absent_cifar_names_the_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"CIFAR10 lacks cifar-10-binary\.tar\.gz"):
        CIFAR10(tmp_path, download=False).setup()


def test_digits_are_scikit_learns_each_in_one_part() -> None:
    data = Digits(normalize=False)
    data.setup()
    parts = [everything(data, part)[0] for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert rows(torch.cat(parts)) == rows(load_digits().images[:, None] / 16)


def test_digits_constants_are_those_of_the_data() -> None:
    pixels = load_digits().images / 16
    assert Digits.mean[0] == pytest.approx(pixels.mean(), abs=1e-4)
    assert Digits.std[0] == pytest.approx(pixels.std(), abs=1e-4)


def test_the_split_follows_split_seed_alone() -> None:
    def test_labels(**kwargs: int) -> list[int]:
        data = Digits(**kwargs)
        data.setup()
        return everything(data, "test")[1].tolist()

    assert test_labels(seed=1) == test_labels(seed=2)
    assert test_labels(split_seed=1) != test_labels(split_seed=2)


def test_every_part_of_a_stratified_order_has_the_classes_in_their_shares() -> None:
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)[torch.randperm(1000)]
    order = stratified_order(labels, seed=3)
    assert sorted(order.tolist()) == list(range(1000))
    for start in (0, 100, 500):
        counts = labels[order[start : start + 100]].bincount(minlength=3)
        assert (counts - torch.tensor([50, 30, 20])).abs().max() <= 1
    assert not torch.equal(order, stratified_order(labels, seed=4))


def test_a_class_may_be_absent() -> None:
    assert sorted(stratified_order(torch.tensor([3, 0, 3]), seed=0).tolist()) == [0, 1, 2]


def test_impossible_sizes_are_quoted() -> None:
    with pytest.raises(ValueError, match=r"test_size must be from 1 to 1,796 .* got 1797"):
        Digits(test_size=1797).setup()
    with pytest.raises(ValueError, match="from 0 to 1,436 of the 1,437 training samples of Digits; got 1437"):
        Digits(val_size=1437).setup()
    with pytest.raises(ValueError, match=r"val_size must be .* got -1"):
        Digits(val_size=-1).setup()


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"lightning-compress\[demo\]"):
        Digits().setup()


def test_without_a_validation_part_a_fit_trains_on_all() -> None:
    data = Digits(val_size=0, shift=1)
    module = Classifier(DigitsConvNet(width=4))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, data)
    assert trainer.global_step == -(-1437 // 64)
    assert "val_acc" not in trainer.callback_metrics


def test_drop_last_and_shift_reach_the_training_loader_only() -> None:
    data = Digits(drop_last=True, shift=1)
    data.setup()
    assert all(len(y) == 64 for _, y in data.train_dataloader())
    assert data.train_dataloader().augment is not None
    assert data.test_dataloader().augment is None
    assert sum(len(y) for _, y in data.test_dataloader()) == 360
