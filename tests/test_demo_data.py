"""The demo's data: what small files of each format become, and what is said of missing or broken ones."""

from __future__ import annotations

import gzip
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastclip.demo.data import (
    DataError,
    image_folder,
    load_cifar10,
    load_digits,
    load_image_folder,
    load_mnist,
    load_text,
)
from fastclip.demo.data.classification import LabelledPixels, standardise

CIFAR_NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


def test_digits_are_scaled_split_by_class_and_seeded():
    data = load_digits(seed=3)
    assert data.train_inputs.shape == (1437, 1, 8, 8)
    assert data.test_inputs.shape == (360, 1, 8, 8)
    assert data.train_inputs.min() == 0
    assert data.train_inputs.max() == 1
    assert data.train_labels.dtype == torch.int64
    counts = torch.bincount(data.test_labels, minlength=data.num_classes)
    assert counts.min() >= 34
    assert counts.max() <= 38
    torch.testing.assert_close(load_digits(seed=3).test_inputs, data.test_inputs, rtol=0, atol=0)
    assert not torch.equal(load_digits(seed=4).test_inputs, data.test_inputs)


def test_channels_are_standardised_by_the_training_images():
    train = LabelledPixels(
        np.array([[0, 0, 0, 200], [7, 7, 7, 7]], np.uint8).reshape(2, 2, 1, 2), np.array([0, 1])
    )
    test = LabelledPixels(np.array([[7, 0, 100, 7]], np.uint8).reshape(1, 2, 1, 2), np.array([1]))
    data = standardise(train, test, 2)
    # Channel 0 holds 0, 0, 7, 7 and channel 1 holds 0, 200, 7, 7.
    mean, deviation = 3.5, 3.5
    torch.testing.assert_close(data.train_inputs[:, 0].flatten(), torch.tensor([-1.0, -1, 1, 1]))
    torch.testing.assert_close(
        data.test_inputs[0, 0].flatten(), torch.tensor([7 - mean, 0 - mean]) / deviation
    )
    assert data.train_inputs[:, 1].mean() == pytest.approx(0, abs=1e-6)
    assert data.train_inputs[:, 1].std(correction=0) == pytest.approx(1)
    assert data.image_shape == (2, 1, 2)


def test_a_channel_of_one_colour_becomes_zero():
    grey = LabelledPixels(np.full((3, 1, 2, 2), 9, np.uint8), np.arange(3))
    assert torch.equal(standardise(grey, grey, 3).train_inputs, torch.zeros(3, 1, 2, 2))


# CIFAR-10


def cifar_records(labels, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(len(labels), 3072), dtype=np.uint8)
    return np.column_stack([np.asarray(labels, np.uint8), pixels])


@pytest.fixture
def cifar(tmp_path):
    """Three records per file, whose first red pixel is 10 x the number of the file."""
    for number, name in enumerate(CIFAR_NAMES):
        records = cifar_records([number, 9, 0], seed=number)
        records[:, 1] = 10 * number
        records.tofile(tmp_path / name)
    return tmp_path


def test_cifar_keeps_labels_and_the_order_of_pixels(cifar):
    data = load_cifar10(cifar)
    assert data.train_inputs.shape == (15, 3, 32, 32)
    assert data.test_inputs.shape == (3, 3, 32, 32)
    assert data.num_classes == 10
    assert sorted(data.train_labels.tolist()) == sorted([0, 9, 0, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9, 0])
    assert sorted(data.test_labels.tolist()) == [0, 5, 9]
    raw = np.fromfile(cifar / "data_batch_2.bin", np.uint8).reshape(-1, 3073)[0, 1:].astype(np.float32)
    (row,) = torch.nonzero(data.train_labels == 1).flatten().tolist()
    ours = data.train_inputs[row].flatten().numpy()
    for channel in range(3):
        pixels = slice(1024 * channel, 1024 * (channel + 1))
        assert np.corrcoef(raw[pixels], ours[pixels])[0, 1] == pytest.approx(1, abs=1e-5)


def test_cifar_is_found_in_the_folder_of_the_archive(cifar):
    inner = cifar / "cifar-10-batches-bin"
    inner.mkdir()
    for name in CIFAR_NAMES:
        (cifar / name).rename(inner / name)
    assert len(load_cifar10(cifar).train_labels) == 15


def test_cifar_takes_a_seeded_sample_of_all_files(cifar):
    first, again, other = (load_cifar10(cifar, num_train=8, num_test=2, seed=seed) for seed in (0, 0, 1))
    assert (len(first.train_labels), len(first.test_labels)) == (8, 2)
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert not torch.equal(first.train_inputs, other.train_inputs)
    assert len(set(first.train_labels.tolist())) > 2


def test_missing_cifar_file_is_named(cifar):
    (cifar / "data_batch_4.bin").unlink()
    with pytest.raises(
        DataError, match=r"data_batch_4\.bin is missing; expected the binary version\. .*http"
    ):
        load_cifar10(cifar)


def test_python_version_of_cifar_is_recognised(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02}")
    with pytest.raises(DataError, match="only data_batch_1 of the Python version; expected the binary"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 3072, 3073 * 2 + 1])
def test_truncated_cifar_file_is_named(cifar, num_bytes):
    path = cifar / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DataError, match=rf"test_batch\.bin has {num_bytes} bytes, and so is truncated"):
        load_cifar10(cifar)


def test_foreign_cifar_file_is_named(cifar):
    cifar_records([3, 77]).tofile(cifar / "data_batch_1.bin")
    with pytest.raises(DataError, match=r"data_batch_1\.bin has label 77 in record 1, and so is of another"):
        load_cifar10(cifar)


# MNIST


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, num_train=12, num_test=5, size=28):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", num_train), ("t10k", num_test)):
        images = rng.integers(256, size=(count, size, size + 1))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))


@pytest.fixture
def mnist(tmp_path):
    write_mnist(tmp_path)
    return tmp_path


def compress(path):
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def test_mnist_keeps_labels_and_the_order_of_pixels(mnist):
    data = load_mnist(mnist)
    assert data.train_inputs.shape == (12, 1, 28, 29)
    assert sorted(data.train_labels.tolist()) == sorted(label % 10 for label in range(12))
    assert len(data.test_labels) == 5
    raw = np.frombuffer((mnist / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    (row,) = torch.nonzero(data.train_labels == 7).flatten().tolist()
    image = raw.reshape(12, 28, 29)[7].astype(np.float32)
    assert np.corrcoef(image.flatten(), data.train_inputs[row].flatten().numpy())[0, 1] == pytest.approx(1)


def test_compressed_mnist_is_the_same(mnist):
    plain = load_mnist(mnist)
    for path in list(mnist.iterdir()):
        compress(path)
    compressed = load_mnist(mnist)
    assert torch.equal(plain.train_inputs, compressed.train_inputs)
    assert torch.equal(plain.test_labels, compressed.test_labels)


def test_mnist_is_found_where_torchvision_puts_it(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    assert len(load_mnist(tmp_path, num_train=7).train_labels) == 7


def test_missing_mnist_file_is_named(mnist):
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        DataError, match=r"holds neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"
    ):
        load_mnist(mnist)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing and has 0 bytes"),
        (b"\x89PNG\r\n\x1a\n" * 4, "begins with 89 50 4e 47 .* begins with 00 00 08 03"),
        (idx(np.zeros(12)), "begins with 00 00 08 01 .* begins with 00 00 08 03"),
        (idx(np.zeros((12, 28, 28)))[:10], "begins with 00 00 08 03 and has 10 bytes, and so is truncated"),
        (idx(np.zeros((12, 28, 28)))[:-1], r"has 9423 bytes .* truncated .* expected 9424 .* \[12, 28, 28\]"),
        (idx(np.zeros((12, 28, 28))) + b"\0", "has 9425 bytes .* damaged; expected 9424"),
        (idx(np.zeros((11, 28, 28))), "has 11 images of .* has 12 labels; expected as many"),
    ],
    ids=["empty", "png", "labels", "half a header", "truncated", "too long", "too few"],
)
def test_broken_mnist_images_are_named(mnist, content, message):
    (mnist / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte {message}"):
        load_mnist(mnist)


def test_mnist_of_other_classes_is_refused(mnist):
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(12) + 15))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte has label 26; expected labels from 0 to 9"):
        load_mnist(mnist)


def test_mnist_parts_of_different_sizes_are_refused(mnist):
    (mnist / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((5, 8, 8))))
    with pytest.raises(DataError, match=r"of shape \(1, 28, 29\), the test images of shape \(1, 8, 8\)"):
        load_mnist(mnist)


@pytest.mark.parametrize("damage", ["truncated", "not compressed", "garbled"])
def test_broken_compressed_mnist_is_named(mnist, damage):
    path = mnist / "train-images-idx3-ubyte"
    plain = path.read_bytes()
    compress(path)
    packed = mnist / "train-images-idx3-ubyte.gz"
    whole = packed.read_bytes()
    garbled = whole[:10] + b"\x07" + whole[11:]  # a block of a kind that there is not
    packed.write_bytes({"truncated": whole[:-100], "not compressed": plain, "garbled": garbled}[damage])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be decompressed"):
        load_mnist(mnist)


# A folder per class


def write_image(path, colour, size=(40, 20), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture
def photos(tmp_path):
    """Ten red images of apples and five green ones of pears."""
    for number in range(10):
        write_image(tmp_path / "apple" / f"{number}.png", (200 + number, 0, 0))
    for number in range(5):
        write_image(tmp_path / "pear" / f"{number}.jpg", (0, 200, 0))
    return tmp_path


def test_classes_are_numbered_by_name_and_a_fifth_of_each_is_held_out(photos):
    data = load_image_folder(photos)
    assert data.train_inputs.shape == (12, 3, 32, 32)
    assert data.num_classes == 2
    assert torch.bincount(data.train_labels).tolist() == [8, 4]
    assert torch.bincount(data.test_labels).tolist() == [2, 1]
    red, green = data.train_inputs[:, :2].mean(dim=(2, 3)).unbind(dim=1)
    assert torch.equal(red > green, data.train_labels == 0)
    assert load_image_folder(photos, size=8).image_shape == (3, 8, 8)


def test_every_mode_becomes_red_green_blue(tmp_path):
    for name in ("dark", "light"):
        for number, mode in enumerate(["L", "RGBA", "P", "CMYK"]):
            suffix = "tif" if mode == "CMYK" else "png"
            write_image(tmp_path / name / f"{number}.{suffix}", (30, 30, 30), mode=mode)
    assert load_image_folder(tmp_path).image_shape == (3, 32, 32)


def test_folders_of_training_and_validation_are_kept_apart(photos):
    for folder in ("train", "val"):
        for name in ("apple", "pear"):
            write_image(photos / folder / name / "0.png", (9, 9, 9))
    data = load_image_folder(photos)
    assert data.train_labels.tolist() == [0, 1] or data.train_labels.tolist() == [1, 0]
    assert len(data.test_labels) == 2


def test_hidden_files_and_folders_are_passed_over(photos):
    (photos / ".cache").mkdir()
    (photos / "pear" / ".DS_Store").write_bytes(b"x")
    assert len(load_image_folder(photos).train_labels) == 12


def test_only_the_sample_is_read(photos):
    for path in photos.glob("*/*"):
        if path.parent.name == "pear":
            path.write_bytes(b"not an image")
    with pytest.raises(DataError, match="no image"):
        load_image_folder(photos)
    assert any(reads_well(photos, seed) for seed in range(20))


def reads_well(folder, seed):
    try:
        load_image_folder(folder, num_train=1, num_test=1, seed=seed)
    except DataError:
        return False
    return True


def test_smallest_folder_has_two_images_in_each_of_two_classes(tmp_path):
    for name in ("a", "b"):
        for number in range(2):
            write_image(tmp_path / name / f"{number}.png", (number, 0, 0))
    data = load_image_folder(tmp_path)
    assert sorted(data.train_labels.tolist()) == sorted(data.test_labels.tolist()) == [0, 1]


def test_missing_images_are_named(photos, tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"apple has 0 folders; expected one per class, at least two"):
        load_image_folder(photos / "apple")
    (photos / "quince").mkdir()
    with pytest.raises(DataError, match=r"quince is empty; expected at least one image"):
        load_image_folder(photos)
    write_image(photos / "quince" / "0.png", (1, 2, 3))
    with pytest.raises(DataError, match=r"quince has one image; expected at least two"):
        load_image_folder(photos)


def test_a_training_folder_wants_a_test_folder_of_the_same_classes(photos):
    for name in ("apple", "pear"):
        write_image(photos / "train" / name / "0.png", (9, 9, 9))
        write_image(photos / "elsewhere" / name / "0.png", (9, 9, 9))
    with pytest.raises(DataError, match="has a folder train and none of test, val, valid, validation"):
        load_image_folder(photos)
    (photos / "elsewhere").rename(photos / "test")
    (photos / "test" / "pear").rename(photos / "test" / "plum")
    with pytest.raises(DataError, match=r"test has the classes apple, plum, .*train has apple, pear"):
        load_image_folder(photos)


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("3.png", 60, r"cannot be read \(.*\), and may be truncated; expected a whole image"),
        ("3.png", 0, "is no image that Pillow knows; expected images only"),
        ("notes.txt", None, "is no image that Pillow knows; expected images only"),
    ],
    ids=["truncated", "empty", "foreign"],
)
def test_broken_image_is_named(photos, name, keep, message):
    path = photos / "apple" / name
    path.write_bytes(b"some notes" if keep is None else path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"apple/{re.escape(name)} {message}"):
        load_image_folder(photos)


def test_a_folder_among_the_images_is_named(photos):
    (photos / "apple" / "more").mkdir()
    with pytest.raises(DataError, match=r"apple/more cannot be read \(.*directory"):
        load_image_folder(photos)


# Text


def test_text_is_numbered_and_parted_at_nine_tenths():
    data = load_text(20_000)
    assert (len(data.train), len(data.test)) == (18_000, 2_000)
    assert data.alphabet == "".join(sorted(set(data.alphabet)))
    text = "".join(data.alphabet[number] for number in torch.cat([data.train, data.test]).tolist())
    assert 'The "assert" statement' in text
    assert set(text) == set(data.alphabet)


def test_text_that_is_too_short_or_missing_is_said_so(monkeypatch):
    with pytest.raises(
        DataError, match=r"pydoc_data\.topics has \d+ characters; expected at least 1000000000"
    ):
        load_text(10**9)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"comes without pydoc_data\.topics"):
        load_text()


@pytest.mark.parametrize(
    ("pixels", "name", "top"),
    [
        (np.linspace(0, 65535, 64).astype(np.uint16), "16.png", 65535),
        (np.linspace(0, 65535, 64).astype(np.uint16), "16.tiff", 65535),
        (np.linspace(0, 65535, 64).astype(np.int32), "32.tiff", 65535),
        (np.linspace(0, 255, 64).astype(np.int32), "dark.tiff", 255),
        (np.linspace(0, 1, 64).astype(np.float32), "unit.tiff", 1),
        (np.linspace(0, 255, 64).astype(np.float32), "float.tiff", 255),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_deep_images_keep_their_levels(tmp_path: Path, pixels: Any, name: str, top: int) -> None:
    path = tmp_path / name
    Image.fromarray(pixels.reshape(8, 8)).save(path)
    read = image_folder._read_image(path, 8)
    assert read.shape == (8, 8, 3)
    assert len(np.unique(read)) == 64
    wanted = pixels.reshape(8, 8).astype(np.float64) * 255 / top
    np.testing.assert_allclose(read[..., 0], wanted, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 300.0], [float("nan"), 1.0]], ids=str)
def test_a_deep_image_of_an_unknown_range_is_refused(tmp_path: Path, values: list[float]) -> None:
    path = tmp_path / "odd.tiff"
    Image.fromarray(np.array([values], np.float32)).save(path)
    with pytest.raises(DataError, match=r"odd.tiff has values from .* 0 to 255 in a floating-point one"):
        image_folder._read_image(path, 8)
