from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lightning_compress.baselines.idx import parse_cifar10, read_idx, read_tar_members


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


ARRAY = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)


def test_plain_and_packed_files_give_the_array(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx(ARRAY))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(ARRAY)))
    assert np.array_equal(read_idx(tmp_path / "a").numpy(), ARRAY)
    assert np.array_equal(read_idx(tmp_path / "a.gz").numpy(), ARRAY)


@pytest.mark.parametrize("length", [0, 3, 4, 7, 15, 16, 75])
def test_a_truncated_file_is_named(tmp_path: Path, length: int) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx(ARRAY)[:length])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is (truncated|not an IDX)"):
        read_idx(path)


def test_a_file_that_is_too_long_is_named_with_both_lengths(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(idx(ARRAY) + b"x")
    with pytest.raises(ValueError, match="5x4x3 values, 76 bytes in all, but it has 77"):
        read_idx(path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "plain"])
def test_a_damaged_gz_is_named(tmp_path: Path, damage: str) -> None:
    packed = bytearray(gzip.compress(idx(ARRAY)))
    if damage == "truncate":
        packed = packed[:-20]
    elif damage == "flip":
        packed[-6] ^= 0xFF  # in the checksum
    else:
        packed = bytearray(idx(ARRAY))
    path = tmp_path / "images.gz"
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"images\.gz is truncated or corrupt"):
        read_idx(path)


def test_another_format_is_refused_with_what_it_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="begins with 3c 68 74"):
        read_idx(path)


def cifar(labels: list[int], images: np.ndarray) -> bytes:
    return b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))


IMAGES = np.random.default_rng(1).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)


def test_cifar_records_give_images_and_labels() -> None:
    images, labels = parse_cifar10(cifar([7, 0, 9], IMAGES), name="x")
    assert np.array_equal(images.numpy(), IMAGES)
    assert labels.tolist() == [7, 0, 9]


@pytest.mark.parametrize("length", [0, 1, 3072, 3074, 3 * 3073 - 1])
def test_a_truncated_cifar_file_is_named(length: int) -> None:
    with pytest.raises(ValueError, match=f"data_batch_2.bin is truncated or corrupt.*{length:,} bytes"):
        parse_cifar10(cifar([7, 0, 9], IMAGES)[:length], name="data_batch_2.bin")


def test_an_impossible_cifar_label_is_quoted() -> None:
    with pytest.raises(ValueError, match=r"data_batch_2\.bin is corrupt.* has a 200"):
        parse_cifar10(cifar([7, 200, 9], IMAGES), name="data_batch_2.bin")


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_members_are_read_out_of_an_archive(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar.gz", {"a": b"1", "b": b"2", "c": b"3"})
    assert read_tar_members(path, ["c", "a"]) == {"a": b"1", "c": b"3"}


def test_a_missing_member_and_a_truncated_archive_are_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar.gz", {"a": np.random.default_rng(0).bytes(5000)})
    with pytest.raises(ValueError, match=r"a\.tar\.gz does not contain b"):
        read_tar_members(path, ["a", "b"])
    content = path.read_bytes()
    for length in (0, 10, 2000, len(content) - 4):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a\.tar\.gz (is truncated or corrupt|does not contain)"):
            read_tar_members(path, ["a", "b"])
