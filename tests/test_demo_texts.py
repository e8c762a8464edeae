"""Texts of different length: how files become numbered words, and that padding changes no score."""

from __future__ import annotations

import pytest
import torch

from fastclip.demo.data import DataError, load_texts
from fastclip.demo.data.texts import PADDING, UNKNOWN, pad
from fastclip.demo.models import TEXT_NETWORKS, TextModel


def write(folder, texts):
    """Write files by their names below a folder."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def reviews(tmp_path):
    """Five texts of each of two classes, a file each, from two words to six."""
    for number in range(5):
        write(tmp_path, {f"bad/{number}.txt": "Bad, " + "so " * number, f"good/{number}.txt": "GOOD!"})
    return tmp_path


def test_words_are_numbered_by_how_often_they_are_in_the_training_texts(tmp_path):
    write(tmp_path, {"train/a/0.txt": "b b a,", "train/c/0.txt": "B\u00e4r a", "test/a/0.txt": "new a"})
    write(tmp_path, {"test/c/0.txt": "b"})
    data = load_texts(tmp_path)
    assert data.vocabulary == ("a", "b", ",", "b\u00e4r")
    assert [(text.tolist(), name) for text, name in data.train] == [([3, 3, 2, 4], "a"), ([5, 2], "c")]
    assert [(text.tolist(), name) for text, name in data.test] == [([UNKNOWN, 2], "a"), ([3], "c")]
    assert data.train.num_tokens == 6
    small = load_texts(tmp_path, max_words=1, max_length=2)
    assert small.vocabulary == ("b",)  # of b b and bär a
    assert [text.tolist() for text, _ in small.train] == [[2, 2], [UNKNOWN, UNKNOWN]]
    assert small.train.num_tokens == 3


def test_a_fifth_of_each_class_is_held_out(reviews):
    data = load_texts(reviews)
    assert sorted(name for _, name in data.train) == ["bad"] * 4 + ["good"] * 4
    assert sorted(name for _, name in data.test) == ["bad", "good"]
    lengths = {len(text) for part in (data.train, data.test) for text, _ in part}
    assert lengths == {2, 3, 4, 5, 6}


def test_a_sample_of_the_texts_is_taken(reviews):
    data = load_texts(reviews, num_train=5, num_test=1)
    assert (len(data.train), len(data.test)) == (5, 1)
    with pytest.raises(DataError, match="0 samples of 8 are asked for; expected at least 1"):
        load_texts(reviews, num_train=0)


def test_a_file_per_class_has_a_text_per_line(tmp_path):
    write(tmp_path, {"bad.txt": "so bad\n\nbad\nworse\n", "good.txt": "good\nbetter\r\nbest of all"})
    data = load_texts(tmp_path)
    assert sorted(name for _, name in data.train) == ["bad", "bad", "good", "good"]
    assert len(data.test) == 2


def test_a_batch_is_filled_up_to_its_longest_text(reviews):
    tokens, classes = pad([(torch.tensor([5, 6, 7]), "a"), (torch.tensor([8]), "b")])
    assert tokens.tolist() == [[5, 6, 7], [8, PADDING, PADDING]]
    assert classes == ["a", "b"]


def spoil(reviews):
    write(reviews, {"bad/Thumbs.db": "x", "bad/empty.txt": " \n", "good/more/0.txt": "good"})
    (reviews / "good" / "latin.txt").write_bytes("b\u00e4r".encode("latin1"))


def test_what_is_no_text_is_named_at_once_or_left_out_by_choice(reviews):
    plain = load_texts(reviews)
    spoil(reviews)
    with pytest.raises(DataError, match=r"has 4 unreadable entries: ") as refusal:
        load_texts(reviews)
    for entry in ("bad/Thumbs.db (no .txt file)", "bad/empty.txt (no word)", "good/more (a folder)"):
        assert entry in str(refusal.value)
    assert "good/latin.txt (cannot be read: 'utf-8' codec" in str(refusal.value)
    data = load_texts(reviews, skip_unreadable=True)
    assert len(data.skipped) == 4
    assert data.vocabulary == plain.vocabulary


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a/0.txt": "x", "a/1.txt": "y"}, "has texts of a; expected at least two classes"),
        ({".hidden": "x"}, "has texts of no class; expected at least two classes"),
        ({"a/0.txt": "x", "b/0.txt": "y", "b/1.txt": "z"}, "has one text of a; expected at least two"),
        ({"train/a/0.txt": "x"}, "has a folder train and none of test, val, valid, validation"),
        (
            {"train/a.txt": "x", "train/b.txt": "x", "val/a.txt": "x", "val/c.txt": "y"},
            "has the classes a, c to test on and a, b to train on; expected the same",
        ),
    ],
    ids=["one class", "nothing", "one text", "no test", "other classes"],
)
def test_classes_that_cannot_be_trained_on_are_named(tmp_path, texts, message):
    write(tmp_path, texts)
    with pytest.raises(DataError, match=message):
        load_texts(tmp_path)


def test_sizes_and_folders_that_are_none_are_named(tmp_path):
    with pytest.raises(DataError, match="max_words=0, max_length=400; expected at least 1"):
        load_texts(tmp_path, max_words=0)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_texts(tmp_path / "nowhere")


@pytest.mark.parametrize("name", TEXT_NETWORKS)
def test_padding_changes_no_score(name):
    torch.manual_seed(0)
    model = TextModel(name, 9, 3)({})
    texts = [torch.tensor([4, 2, 8]), torch.tensor([5]), torch.tensor([1, 1, 7, 3, 6])]
    alone = torch.cat([model(text[None]) for text in texts])
    together = model(pad([(text, "") for text in texts])[0])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("name", TEXT_NETWORKS)
def test_order_of_words_matters_to_the_recurrent_network_alone(name):
    torch.manual_seed(0)
    model = TextModel(name, 9, 3)({})
    there, back = model(torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]))
    assert torch.allclose(there, back) is (name == "embedding-bag")
