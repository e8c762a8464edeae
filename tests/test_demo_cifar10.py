"""CIFAR-10 from small files of both versions, and what is said of missing, broken and hostile ones."""

from __future__ import annotations

import io
import os
import pickle
import struct
from typing import Any

import numpy as np
import pytest
import torch

from fastclip.demo.data import DataError, load_cifar10

CIFAR_NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


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


def test_missing_cifar_files_are_named(cifar):
    (cifar / "data_batch_4.bin").unlink()
    (cifar / "test_batch.bin").unlink()
    message = (
        r"data_batch_4\.bin, test_batch\.bin is missing from .*; expected all 6 files of the binary version"
    )
    with pytest.raises(DataError, match=message):
        load_cifar10(cifar)


def test_a_folder_without_cifar_is_told_of_both_versions(tmp_path):
    message = r"holds neither data_batch_1\.bin nor data_batch_1, nor a folder cifar-10-batches-bin or .*-py"
    with pytest.raises(DataError, match=message):
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


# The Python version


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings, the authors' batches among them."""

    def save_string(self, text):
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def pickled_by_python_2(content: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def pickled_for_python_2(content: Any) -> bytes:
    return pickle.dumps(content, protocol=2)


NAMES = [f"kind {number}" for number in range(10)]


def write_python_version(folder, binary, write=pickled_by_python_2):
    """Write what the binary files in a folder hold as the Python version."""
    folder.mkdir(exist_ok=True)
    for name in CIFAR_NAMES:
        records = np.fromfile(binary / name, np.uint8).reshape(-1, 3073)
        batch = {"batch_label": name, "labels": records[:, 0].tolist(), "data": records[:, 1:].copy()}
        (folder / name.removesuffix(".bin")).write_bytes(write(batch))
    (folder / "batches.meta").write_bytes(write({"num_vis": 3072, "label_names": NAMES}))
    for name in CIFAR_NAMES:
        (binary / name).unlink()


@pytest.fixture
def python_cifar(cifar):
    write_python_version(cifar, cifar)
    return cifar


@pytest.mark.parametrize("write", [pickled_by_python_2, pickled_for_python_2, pickle.dumps])
@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py"])
def test_the_python_version_is_the_binary_one(cifar, write, subfolder):
    binary = load_cifar10(cifar)
    write_python_version(cifar / subfolder, cifar, write)
    python = load_cifar10(cifar)
    assert torch.equal(python.train_inputs, binary.train_inputs)
    assert torch.equal(python.train_labels, binary.train_labels)
    assert torch.equal(python.test_inputs, binary.test_inputs)
    assert python.classes == tuple(NAMES)
    assert binary.classes[3] == "cat"


def test_files_in_the_folder_go_before_those_in_a_subfolder(cifar):
    inner = cifar / "cifar-10-batches-bin"
    inner.mkdir()
    cifar_records([7]).tofile(inner / "data_batch_1.bin")
    assert len(load_cifar10(cifar).train_labels) == 15


def test_a_missing_batch_of_the_python_version_is_named(python_cifar):
    (python_cifar / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3 is missing from .* 6 files of the Python version"):
        load_cifar10(python_cifar)


def test_class_names_are_those_of_cifar_where_the_file_of_names_is_missing(python_cifar):
    (python_cifar / "batches.meta").unlink()
    assert load_cifar10(python_cifar).classes[:2] == ("airplane", "automobile")


class Hostile:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_names_code_is_refused_and_the_code_not_run(python_cifar, tmp_path):
    trap = tmp_path / "trap"
    (python_cifar / "test_batch").write_bytes(pickle.dumps({"data": Hostile(trap)}))
    with pytest.raises(
        DataError, match=r"test_batch cannot be unpickled \(it names posix\.mkdir, which no batch"
    ):
        load_cifar10(python_cifar)
    assert not trap.exists()
    pickle.loads((python_cifar / "test_batch").read_bytes())  # and it is a trap
    assert trap.exists()


IMAGES = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cannot be unpickled \(Ran out of input\), and so is truncated"),
        (b"\x89PNG\r\n\x1a\n", r"cannot be unpickled \(.*\), and so is truncated or of another kind"),
        (pickled_by_python_2({"data": IMAGES, "labels": [1, 2]})[:-3], "cannot be unpickled .* truncated"),
        (pickle.dumps([1, 2]), "holds a list, and so is of another kind; expected a dict"),
        (pickle.dumps({}), "has nothing and no data"),
        (pickle.dumps({"data": IMAGES, "fine_labels": [1, 2]}), "has data, fine_labels and no labels"),
        (
            pickle.dumps({"data": [1], "labels": [1]}),
            r"has data of list, .* expected uint8 of shape \(n, 3072\)",
        ),
        (
            pickle.dumps({"data": np.zeros((2, 784)), "labels": [1, 2]}),
            r"has data of float64 of shape \(2, 784\)",
        ),
        (
            pickle.dumps({"data": IMAGES, "labels": [1]}),
            "has 1 labels and 2 images; expected a list of as many",
        ),
        (pickle.dumps({"data": IMAGES, "labels": "ab"}), "has labels of str and 2 images"),
        (pickle.dumps({"data": IMAGES[:0], "labels": []}), "has 0 labels and 0 images; .* at least one"),
        (pickle.dumps({"data": IMAGES, "labels": [0, -1]}), "has label -1 in record 1"),
        (pickle.dumps({"data": IMAGES, "labels": [0, 1 << 80]}), "has a label beyond 64 bits"),
    ],
    ids=[
        *("empty", "png", "truncated", "list", "bare", "cifar100", "data", "mnist", "few", "text", "none"),
        *("negative", "huge"),
    ],
)
def test_a_broken_batch_of_the_python_version_is_named(python_cifar, content, message):
    (python_cifar / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=rf"data_batch_2 {message}"):
        load_cifar10(python_cifar)


@pytest.mark.parametrize("names", [NAMES[:9], [*NAMES[:9], NAMES[0]], "names", [1] * 10])
def test_broken_class_names_are_named(python_cifar, names):
    (python_cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(DataError, match=r"batches\.meta has label_names .* expected a list of 10 different"):
        load_cifar10(python_cifar)
