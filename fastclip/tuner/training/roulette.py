"""The roulette wheel: a scikit-learn splitter that draws test sets, or folds, by weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import BaseCrossValidator
from sklearn.utils import check_random_state, indexable

MAX_SPINS = 1000
DEFAULT_TEST_SHARE = 0.2

Indices = npt.NDArray[np.intp]


class RouletteWheelSplit(BaseCrossValidator):  # type: ignore[misc]
    """Draw each split on a roulette wheel.

    Two wheels:

    - `wheel="samples"`: in each of n_splits rounds the test set is drawn sample by sample, without
      replacement, with probability proportional to the weights of the samples left. Its size is exact.
      With equal weights this is `ShuffleSplit`. Test sets of different rounds may overlap.
    - `wheel="folds"`: each sample spins once for its fold; fold k has a sector of width p_k. The folds are
      disjoint and hold every sample. A spin that leaves a fold empty is done again, at most 1000 times.

    Args:
        n_splits: Number of splits.
        test_size: Share or number of test samples for `wheel="samples"`; None is 1 / n_splits (0.2 for one).
        wheel: "samples" or "folds".
        weights: For `wheel="samples"` None, "balanced" (each class is as likely as any other, until its
            share of the test set is drawn, so that a rare one is left to train on) or n non-negative numbers.
            For `wheel="folds"` None or n_splits positive sector widths.
        stratify: Spin class by class: the test set keeps the shares of the classes (`wheel="samples"`), or
            every fold gets a member of every class (`wheel="folds"`).
        random_state: As everywhere in scikit-learn.

    Raises:
        ValueError: when splitting: weights that do not fit, or a fold that stays empty.

    Source:
        Weighted draw without replacement by one exponential key per sample: Efraimidis and Spirakis,
        Weighted random sampling with a reservoir, Information Processing Letters 97 (2006).
    """

    def __init__(
        self,
        n_splits: int = 5,
        *,
        test_size: float | int | None = None,
        wheel: Literal["samples", "folds"] = "samples",
        weights: Any = None,
        stratify: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_splits = n_splits
        self.test_size = test_size
        self.wheel = wheel
        self.weights = weights
        self.stratify = stratify
        self.random_state = random_state

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:  # noqa: N803
        """Return the number of splits."""
        del X, y, groups
        return self.n_splits

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Iterator[tuple[Indices, Indices]]:  # noqa: N803
        """Yield the indices of the training and of the test set of each split, in ascending order."""
        rows, targets, _ = indexable(X, y, groups)
        n_samples = rows.shape[0] if hasattr(rows, "shape") else len(rows)
        classes = None if targets is None else np.asarray(targets)
        self._check(n_samples, classes)
        rng = check_random_state(self.random_state)
        draws = self._spin_folds(n_samples, classes, rng) if self.wheel == "folds" else None
        for k in range(self.n_splits):
            in_test = draws == k if draws is not None else self._spin_samples(n_samples, classes, rng)
            yield np.flatnonzero(~in_test), np.flatnonzero(in_test)

    def _check(self, n_samples: int, classes: npt.NDArray[Any] | None) -> None:
        name = type(self).__name__
        if self.wheel not in ("samples", "folds"):
            raise ValueError(f"{name}: wheel={self.wheel!r}; expected 'samples' or 'folds'.")
        if self.n_splits < (2 if self.wheel == "folds" else 1):
            raise ValueError(
                f"{name}: n_splits={self.n_splits}; expected at least 1, or 2 for wheel='folds'."
            )
        if classes is None and (self.stratify or isinstance(self.weights, str)):
            raise ValueError(
                f"{name}: stratify=True and weights='balanced' need y; expected one class per sample."
            )
        if self.wheel == "folds" and self.test_size is not None:
            raise ValueError(
                f"{name}: test_size={self.test_size} with wheel='folds'; expected None. Give the sectors as "
                "weights."
            )
        if self.wheel == "folds" and self.n_splits > n_samples:
            raise ValueError(
                f"{name}: {self.n_splits} folds for {n_samples} samples; expected n_splits <= samples."
            )

    @property
    def _is_balanced(self) -> bool:
        return isinstance(self.weights, str)

    def _num_test(self, n_samples: int) -> int:
        size = self.test_size
        if size is None:
            size = 1 / self.n_splits if self.n_splits > 1 else DEFAULT_TEST_SHARE
        num_test = math.ceil(size * n_samples) if isinstance(size, float) else int(size)
        if not 0 < num_test < n_samples:
            raise ValueError(
                f"RouletteWheelSplit: test_size={self.test_size} makes {num_test} of {n_samples} test "
                f"samples; expected between 1 and {n_samples - 1}."
            )
        return num_test

    def _sample_weights(self, n_samples: int, classes: npt.NDArray[Any] | None) -> npt.NDArray[np.float64]:
        if self.weights is None:
            return np.ones(n_samples)
        if isinstance(self.weights, str):
            if self.weights != "balanced":
                raise ValueError(
                    f"RouletteWheelSplit: weights={self.weights!r}; expected 'balanced', None or numbers."
                )
            _, inverse, counts = np.unique(np.asarray(classes), return_inverse=True, return_counts=True)
            balanced: npt.NDArray[np.float64] = 1.0 / counts[inverse]
            return balanced
        weights = np.asarray(self.weights, dtype=np.float64)
        if weights.shape != (n_samples,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(
                f"RouletteWheelSplit: weights of shape {weights.shape}; expected {n_samples} finite numbers "
                ">= 0, one per sample."
            )
        return weights

    def _spin_samples(
        self, n_samples: int, classes: npt.NDArray[Any] | None, rng: np.random.RandomState
    ) -> npt.NDArray[np.bool_]:
        weights = self._sample_weights(n_samples, classes)
        num_test = self._num_test(n_samples)
        in_test = np.zeros(n_samples, dtype=np.bool_)
        if not self.stratify or classes is None:
            drawn = _draw(np.arange(n_samples), weights, n_samples if self._is_balanced else num_test, rng)
            if self._is_balanced:
                drawn = _cap(drawn, np.asarray(classes), num_test)
            in_test[drawn] = True
            return in_test
        members = [np.flatnonzero(classes == label) for label in np.unique(classes)]
        for rows, count in zip(members, _apportion([len(m) for m in members], num_test), strict=True):
            in_test[_draw(rows, weights[rows], count, rng)] = True
        return in_test

    def _spin_folds(
        self, n_samples: int, classes: npt.NDArray[Any] | None, rng: np.random.RandomState
    ) -> npt.NDArray[np.intp]:
        sectors = (
            np.ones(self.n_splits) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        )
        if sectors.shape != (self.n_splits,) or not np.isfinite(sectors).all() or not (sectors > 0).all():
            raise ValueError(
                f"RouletteWheelSplit: weights={self.weights!r}; expected {self.n_splits} positive sector "
                "widths, one per fold."
            )
        edges = np.cumsum(sectors / sectors.sum())[:-1]
        folds = np.empty(n_samples, dtype=np.intp)
        if not self.stratify or classes is None:
            folds[:] = _spin(n_samples, edges, rng, "the data")
            return folds
        for label in np.unique(classes):
            rows = np.flatnonzero(classes == label)
            folds[rows] = _spin(len(rows), edges, rng, f"class {label}")
        return folds


def _draw(rows: Indices, weights: npt.NDArray[np.float64], count: int, rng: np.random.RandomState) -> Indices:
    """Draw count rows without replacement: the smallest of the keys Exp(1) / weight."""
    if np.count_nonzero(weights) < count:
        raise ValueError(
            f"RouletteWheelSplit: {np.count_nonzero(weights)} samples have a positive weight; expected at "
            f"least {count}, the size of the test set."
        )
    with np.errstate(divide="ignore"):
        keys = rng.standard_exponential(len(rows)) / weights
    return rows[np.argsort(keys, kind="stable")[:count]]


def _cap(rows: Indices, classes: npt.NDArray[Any], count: int) -> Indices:
    """Return the first count rows, without those of a class beyond its share of the test set."""
    labels, numbers, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    limits = np.ceil(sizes * count / len(classes))
    is_within = np.zeros(len(rows), dtype=np.bool_)
    for k in range(len(labels)):
        is_class = numbers[rows] == k
        is_within |= is_class & (np.cumsum(is_class) <= limits[k])
    return rows[is_within][:count]


def _apportion(sizes: list[int], total: int) -> list[int]:
    """Divide total in proportion to sizes, by largest remainder."""
    shares = np.asarray(sizes) * total / sum(sizes)
    counts = np.floor(shares).astype(int)
    for k in np.argsort(counts - shares, kind="stable")[: total - counts.sum()]:
        counts[k] += 1
    return [int(count) for count in counts]


def _spin(
    count: int, edges: npt.NDArray[np.float64], rng: np.random.RandomState, what: str
) -> npt.NDArray[np.intp]:
    num_folds = len(edges) + 1
    if count >= num_folds:
        for _ in range(MAX_SPINS):
            folds = np.searchsorted(edges, rng.random_sample(count), side="right")
            if len(np.unique(folds)) == num_folds:
                return folds.astype(np.intp)
    raise ValueError(
        f"RouletteWheelSplit: {what} has {count} samples and left one of {num_folds} folds empty in each of "
        f"{MAX_SPINS} spins; expected a member in every fold. Use fewer folds, wider sectors or "
        "stratify=False."
    )
