from collections import Counter

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, KFold, PredefinedSplit, TimeSeriesSplit, cross_val_score
from sklearn.tree import DecisionTreeClassifier

from fastclip.tuner import RouletteWheelSplit, check_cv
from fastclip.tuner.data import as_data
from fastclip.tuner.training.splits import fingerprint, make_splits, missing_classes


def rows(n):
    return np.empty((n, 0))


def test_number_of_folds_is_stratified_and_shuffled():
    y = np.repeat([0, 1], 20)
    splits = make_splits(4, as_data(np.zeros((40, 1)), y, caller="test"), seed=0)
    assert [np.bincount(y[test]).tolist() for _, test in splits] == [[5, 5]] * 4


def test_share_is_one_stratified_split():
    y = np.repeat([0, 1], 20)
    ((train, test),) = make_splits(0.25, as_data(np.zeros((40, 1)), y, caller="test"), seed=0)
    assert (len(train), np.bincount(y[test]).tolist()) == (30, [5, 5])


@pytest.mark.parametrize("cv", [1, 0, 1.5, 0.0])
def test_number_out_of_range_is_refused(cv):
    with pytest.raises(ValueError, match="check_cv: cv="):
        check_cv(cv, is_classification=True, seed=0)


@pytest.mark.parametrize("cv", [None, True, "five"])
def test_cv_of_another_type_is_refused(cv):
    with pytest.raises(TypeError, match="check_cv: cv="):
        check_cv(cv, is_classification=True, seed=0)


@pytest.mark.parametrize(
    "cv",
    [
        KFold(3, shuffle=True),
        GroupKFold(3),
        TimeSeriesSplit(3),
        PredefinedSplit(np.arange(30) % 3),
        RouletteWheelSplit(3),
        [(np.arange(20), np.arange(20, 30))],
    ],
    ids=lambda cv: type(cv).__name__,
)
def test_every_splitter_gives_the_same_splits_for_the_same_seed(cv):
    groups = np.arange(30) // 3 if isinstance(cv, GroupKFold) else None
    data = as_data(np.zeros((30, 1)), np.arange(30) % 2, groups, caller="test")
    first, second = make_splits(cv, data, seed=5), make_splits(cv, data, seed=5)
    assert fingerprint(first) == fingerprint(second)
    assert getattr(cv, "random_state", None) is None, "the caller's splitter must not be changed"
    if isinstance(cv, RouletteWheelSplit) or getattr(cv, "shuffle", False):
        assert fingerprint(make_splits(cv, data, seed=6)) != fingerprint(first)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no splits"),
        ([([0, 1], [])], "test part of fold 0 is empty"),
        ([([0, 1], [1, 2])], "share samples"),
        ([([0, 1], [99])], "expected 0 to 9"),
    ],
)
def test_wrong_pairs_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        make_splits(pairs, as_data(np.zeros((10, 1)), np.zeros(10, dtype=int), caller="test"), seed=0)


def test_missing_classes_are_those_never_trained_on():
    data = as_data(np.zeros((6, 1)), np.array([0, 0, 1, 1, 2, 2]), caller="test")
    assert missing_classes(data, (np.array([0, 2]), np.array([1, 3, 4]))) == [2]
    assert missing_classes(data, (np.array([0, 2, 4]), np.array([1]))) == []


class TestWheelOfSamples:
    def test_test_size_is_exact_and_parts_are_disjoint(self):
        for train, test in RouletteWheelSplit(7, test_size=0.3, random_state=0).split(rows(41)):
            assert len(test) == 13
            assert sorted([*train, *test]) == list(range(41))

    def test_default_test_size_is_the_share_of_a_fold(self):
        assert {len(test) for _, test in RouletteWheelSplit(4, random_state=0).split(rows(40))} == {10}
        assert {len(test) for _, test in RouletteWheelSplit(1, random_state=0).split(rows(40))} == {8}

    def test_uniform_wheel_draws_every_pair_equally_often(self):
        # As ShuffleSplit does: each of the 6 pairs of 4 samples has probability 1/6.
        counts = Counter(
            tuple(test) for _, test in RouletteWheelSplit(6000, test_size=2, random_state=0).split(rows(4))
        )
        deviation = np.sqrt(6000 * (1 / 6) * (5 / 6))
        assert len(counts) == 6
        assert all(abs(count - 1000) < 5 * deviation for count in counts.values())

    def test_pairs_follow_the_weights_without_replacement(self):
        # Worked out by hand for weights 1, 2, 3 and two draws: P{0,1} = 1/6*2/5 + 2/6*1/4 = 3/20,
        # P{0,2} = 1/6*3/5 + 3/6*1/3 = 4/15, P{1,2} = 2/6*3/4 + 3/6*2/3 = 7/12.
        n = 12000
        wheel = RouletteWheelSplit(n, test_size=2, weights=[1, 2, 3], random_state=0)
        counts = Counter(tuple(test) for _, test in wheel.split(rows(3)))
        for pair, p in {(0, 1): 3 / 20, (0, 2): 4 / 15, (1, 2): 7 / 12}.items():
            assert abs(counts[pair] - n * p) < 5 * np.sqrt(n * p * (1 - p))

    def test_weight_zero_is_never_tested(self):
        wheel = RouletteWheelSplit(50, test_size=2, weights=[0, 1, 1, 1], random_state=0)
        assert all(0 not in test for _, test in wheel.split(rows(4)))

    def test_too_few_positive_weights_are_refused(self):
        with pytest.raises(ValueError, match="1 samples have a positive weight; expected at least 2"):
            list(RouletteWheelSplit(test_size=2, weights=[0, 0, 1], random_state=0).split(rows(3)))

    def test_balanced_wheel_evens_out_a_rare_class(self):
        y = np.array([0] * 90 + [1] * 10)
        wheel = RouletteWheelSplit(400, test_size=1, weights="balanced", random_state=0)
        rare = sum(y[test[0]] for _, test in wheel.split(rows(100), y))
        assert abs(rare - 200) < 5 * np.sqrt(400 * 0.25)

    def test_balanced_wheel_leaves_a_rare_class_its_share_to_train_on(self):
        y = np.array([0] * 950 + [1] * 50)
        for train, test in RouletteWheelSplit(5, weights="balanced", random_state=0).split(rows(1000), y):
            assert np.bincount(y[test]).tolist() == [190, 10]
            assert np.bincount(y[train]).tolist() == [760, 40]

    def test_stratified_wheel_keeps_the_shares(self):
        y = np.array([0] * 60 + [1] * 30 + [2] * 10)
        for _, test in RouletteWheelSplit(5, test_size=0.1, stratify=True, random_state=0).split(
            rows(100), y
        ):
            assert np.bincount(y[test]).tolist() == [6, 3, 1]


class TestWheelOfFolds:
    def test_folds_are_disjoint_and_hold_everything(self):
        tests = [test for _, test in RouletteWheelSplit(5, wheel="folds", random_state=0).split(rows(50))]
        assert sorted(np.concatenate(tests)) == list(range(50))
        assert all(len(test) for test in tests)

    def test_sector_widths_set_the_shares(self):
        wheel = RouletteWheelSplit(2, wheel="folds", weights=[1, 3], random_state=0)
        (_, first), _ = wheel.split(rows(4000))
        assert abs(len(first) - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75)

    def test_empty_fold_is_spun_again(self):
        # A fold of two samples stays empty in half of the spins.
        for seed in range(20):
            tests = [
                test for _, test in RouletteWheelSplit(2, wheel="folds", random_state=seed).split(rows(2))
            ]
            assert [len(test) for test in tests] == [1, 1]

    def test_fold_that_stays_empty_is_an_error(self):
        wheel = RouletteWheelSplit(2, wheel="folds", weights=[1e-12, 1], random_state=0)
        with pytest.raises(ValueError, match="left one of 2 folds empty in each of 1000 spins"):
            list(wheel.split(rows(10)))

    def test_stratified_folds_have_every_class(self):
        y = np.array([0] * 30 + [1] * 4)
        for _, test in RouletteWheelSplit(3, wheel="folds", stratify=True, random_state=0).split(rows(34), y):
            assert set(y[test]) == {0, 1}

    def test_class_smaller_than_the_folds_is_an_error(self):
        y = np.array([0] * 30 + [1] * 2)
        with pytest.raises(ValueError, match="class 1 has 2 samples"):
            list(RouletteWheelSplit(3, wheel="folds", stratify=True, random_state=0).split(rows(32), y))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wheel": "fortune"}, "wheel='fortune'"),
        ({"n_splits": 0}, "n_splits=0"),
        ({"n_splits": 1, "wheel": "folds"}, "n_splits=1"),
        ({"stratify": True}, "need y"),
        ({"weights": "balanced"}, "need y"),
        ({"wheel": "folds", "test_size": 0.2}, "test_size=0.2 with wheel='folds'"),
        ({"wheel": "folds", "n_splits": 11}, "11 folds for 10 samples"),
        ({"wheel": "folds", "weights": [1, 2]}, "expected 5 positive sector widths"),
        ({"weights": [1, 2]}, "expected 10 finite numbers"),
        ({"weights": [-1.0] * 10}, "expected 10 finite numbers"),
        ({"test_size": 10}, "makes 10 of 10 test samples"),
        ({"test_size": 0}, "makes 0 of 10 test samples"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        list(RouletteWheelSplit(**arguments, random_state=0).split(rows(10)))


def test_wheel_is_a_scikit_learn_splitter():
    wheel = RouletteWheelSplit(3, test_size=0.2, random_state=0)
    assert repr(clone(wheel, safe=False)) == repr(wheel)
    y = np.arange(30) % 2
    scores = cross_val_score(DecisionTreeClassifier(random_state=0), y[:, None], y, cv=wheel)
    assert scores.tolist() == [1.0, 1.0, 1.0]
