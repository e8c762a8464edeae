"""The demo's data: what small files of each format become, and what is said of missing or broken ones."""

from __future__ import annotations

import gzip
import struct
import sys

import numpy as np
import pytest
import torch

from fastclip.demo.data import DataError, load_digits, load_mnist, load_text
from fastclip.demo.data.classification import LabelledPixels, standardise


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
