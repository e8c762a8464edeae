"""Folders of images: what they become, and what is said of files that are missing, broken or no images."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastclip.demo.data import DataError, image_files, load_image_folder
from fastclip.demo.data.image_files import UnreadableImageError


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
    with pytest.raises(DataError, match="5 unreadable entries"):
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


TRUNCATED = r"\(cannot be read, may be truncated: .+\)"
FOREIGN = r"\(no image that Pillow knows\)"


@pytest.mark.parametrize(
    ("name", "keep", "reason"),
    [
        ("3.png", 60, TRUNCATED),
        ("3.png", 0, FOREIGN),
        ("notes.txt", None, FOREIGN),
        ("Thumbs.db", None, FOREIGN),
    ],
    ids=["truncated", "empty", "notes", "thumbs"],
)
def test_what_is_no_whole_image_is_named(photos, name, keep, reason):
    path = photos / "apple" / name
    path.write_bytes(b"some notes" if keep is None else path.read_bytes()[:keep])
    message = rf"has 1 unreadable entry: .*apple/{re.escape(name)} {reason}; expected images only\."
    with pytest.raises(DataError, match=message):
        load_image_folder(photos)


def spoil(photos):
    """Twelve entries that are no images: three kinds of files, broken images, a folder."""
    for number in range(7):
        (photos / "apple" / f"note{number}.txt").write_text("a note")
    (photos / "apple" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (photos / "pear" / "desktop.ini").write_text("[.ShellClassInfo]")
    write_image(photos / "pear" / "more" / "0.png", (1, 2, 3))
    for path in (photos / "apple" / "2.png", photos / "pear" / "4.jpg"):
        path.write_bytes(path.read_bytes()[:-50])


def test_all_are_found_at_once_and_the_first_ten_named(photos):
    spoil(photos)
    with pytest.raises(DataError) as refusal:
        load_image_folder(photos)
    message = str(refusal.value)
    assert "has 12 unreadable entries: " in message
    assert message.count(" (no image that Pillow knows)") == 9
    assert f"{photos / 'pear' / 'more'} (a folder), and 2 more; expected images only." in message
    assert message.endswith("skip_unreadable=True, in the demo --skip-unreadable.")


def test_all_are_left_out_by_choice_and_listed(photos):
    spoil(photos)
    data = load_image_folder(photos, skip_unreadable=True)
    assert len(data.skipped) == 12
    assert f"{photos / 'pear' / 'more'} (a folder)" in data.skipped
    assert sum("2.png (cannot be read, may be truncated: " in sentence for sentence in data.skipped) == 1
    for sentence in data.skipped:
        entry = Path(sentence.partition(" (")[0])
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    cleaned = load_image_folder(photos)
    assert torch.equal(data.train_inputs, cleaned.train_inputs)
    assert torch.equal(data.test_inputs, cleaned.test_inputs)
    assert torch.equal(data.train_labels, cleaned.train_labels)
    assert len(cleaned.train_labels) + len(cleaned.test_labels) == 15 - 2


def test_a_sample_is_filled_up_when_some_of_it_is_skipped(photos):
    spoil(photos)
    data = load_image_folder(photos, num_train=6, num_test=2, skip_unreadable=True)
    assert (len(data.train_labels), len(data.test_labels)) == (6, 2)


def test_choosing_to_skip_changes_nothing_where_all_are_images(photos):
    plain, skipping = load_image_folder(photos), load_image_folder(photos, skip_unreadable=True)
    assert torch.equal(plain.train_inputs, skipping.train_inputs)
    assert plain.skipped == skipping.skipped == ()
    assert plain.classes == ("apple", "pear")


def test_a_class_left_without_an_image_is_an_error_also_when_skipping(photos):
    for path in (photos / "pear").iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"pear is left with no image: it has 5 unreadable entries: .*0\.jpg"):
        load_image_folder(photos, skip_unreadable=True)
    write_image(photos / "pear" / "0.jpg", (0, 200, 0))
    with pytest.raises(DataError, match=r"pear has one image; expected at least two"):
        load_image_folder(photos, skip_unreadable=True)
    for path in list((photos / "pear").iterdir()):
        path.rename(path.with_suffix(".txt")).write_text("no image")
    message = r"pear has 5 unreadable entries: .*0\.txt .*; expected at least one image"
    with pytest.raises(DataError, match=message):
        load_image_folder(photos, skip_unreadable=True)


def test_entries_of_the_test_folder_are_named_with_those_of_the_training_folder(photos):
    for part in ("train", "test"):
        for name in ("apple", "pear"):
            write_image(photos / part / name / "0.png", (9, 9, 9))
        (photos / part / "pear" / "Thumbs.db").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"2 unreadable entries: .*train/pear/Thumbs\.db .*test/pear/Thumbs\.db"
    ):
        load_image_folder(photos)
    assert len(load_image_folder(photos, skip_unreadable=True).skipped) == 2


def test_a_name_in_no_known_encoding_can_be_printed(photos):
    with open(os.path.join(os.fsencode(photos), b"pear", b"caf\xe9.txt"), "wb"):
        pass
    (sentence,) = load_image_folder(photos, skip_unreadable=True).skipped
    assert sentence == f"{photos / 'pear'}/caf\ufffd.txt (no image that Pillow knows)"
    sentence.encode()


def test_an_image_without_a_suffix_is_one(photos):
    (photos / "apple" / "3.png").rename(photos / "apple" / "3")
    assert len(load_image_folder(photos).train_labels) == 12


def test_every_image_is_decoded_once(photos, monkeypatch):
    decoded = []
    convert = Image.Image.convert
    monkeypatch.setattr(
        Image.Image, "convert", lambda image, mode: decoded.append(image.filename) or convert(image, mode)
    )
    (photos / "apple" / "3.png").rename(photos / "apple" / "3")
    load_image_folder(photos, skip_unreadable=True)
    assert len(decoded) == len(set(decoded)) == 15


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
    read = image_files.read_image(path, 8)
    assert read.shape == (8, 8, 3)
    assert len(np.unique(read)) == 64
    wanted = pixels.reshape(8, 8).astype(np.float64) * 255 / top
    np.testing.assert_allclose(read[..., 0], wanted, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 300.0], [float("nan"), 1.0]], ids=str)
def test_a_deep_image_of_an_unknown_range_is_refused(tmp_path: Path, values: list[float]) -> None:
    path = tmp_path / "odd.tiff"
    Image.fromarray(np.array([values], np.float32)).save(path)
    with pytest.raises(UnreadableImageError, match=r"values from .* 0 to 255 in a floating-point one"):
        image_files.read_image(path, 8)
