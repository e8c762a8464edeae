"""What a user gives, as the tuner sees and scores it: targets, shapes of outputs, fingerprints of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, random_split

from fastclip.tuner import AllTrialsExplodedError, Float, TunerCV, cross_validate, suggest_clip_range
from fastclip.tuner.data import as_data
from fastclip.tuner.training.losses import default_loss
from fastclip.tuner.training.metrics import measure
from fastclip.tuner.training.scoring import check_scoring

SCORING = check_scoring(["accuracy", "recall_macro", "roc_auc"], is_classification=True)


def bce(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(outputs.reshape(-1), targets.reshape(-1).float())


class Pictures(Dataset[Any]):
    """Shaped as torchvision's datasets: labels in `targets`, transforms applied when a sample is read."""

    def __init__(
        self,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        target_transform: Callable[[int], int] | None = None,
        num_samples: int = 40,
    ) -> None:
        self.targets = [7, 9] * (num_samples // 2)
        self.transform, self.target_transform = transform, target_transform
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.num_reads += 1
        picture, label = torch.full((3,), float(index)), self.targets[index]
        return (
            self.transform(picture) if self.transform else picture,
            self.target_transform(label) if self.target_transform else label,
        )


def noisy(picture: torch.Tensor) -> torch.Tensor:
    return picture + torch.rand(3)


@pytest.mark.parametrize("shape", [(150,), (150, 1)], ids=str)
def test_one_logit_is_scored_by_its_sign(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(150, generator=generator), torch.arange(150) % 2
    values = measure(logits.reshape(shape), targets, bce, SCORING, np.array([0, 1]))
    right = (logits > 0) == targets.bool()
    assert values["accuracy"] == pytest.approx(right.double().mean().item())
    assert values["recall_1"] == pytest.approx(right[targets == 1].double().mean().item())
    # Of a positive and a negative sample, how often the positive one has the larger logit.
    larger = logits[targets == 1][:, None] > logits[targets == 0]
    assert values["roc_auc"] == pytest.approx(larger.double().mean().item())


def test_a_binary_network_with_one_logit_cross_validates() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 4)).astype("float32")
    y = (x[:, 0] > 0.3).astype(int)
    result = cross_validate(lambda p: nn.Linear(4, 1), {"lr": 0.5}, x, y, cv=3, max_epochs=20, loss=bce)
    assert list(result["status"]) == ["ok"] * 3
    assert result["mean_test_score"] > 0.9


@pytest.mark.parametrize("extra", [(5,), (5, 6)], ids=str)
def test_class_scores_may_be_behind_the_batch_or_at_the_end(extra: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (8, *extra), generator=generator)
    scores = F.one_hot(targets, 3).float() + 0.1 * torch.rand((*targets.shape, 3), generator=generator)
    scores[0] = scores[0].roll(1, -1)  # one sample of eight is wrong throughout
    scoring = check_scoring("accuracy", is_classification=True)
    second = measure(scores.movedim(-1, 1), targets, F.cross_entropy, scoring, np.arange(3))
    last = measure(scores, targets, default_loss, scoring, np.arange(3))
    assert second == pytest.approx(last)
    assert second["accuracy"] == 7 / 8


def test_where_both_fit_the_loss_says_which_dimension_is_meant() -> None:
    targets = torch.tensor([[0, 1, 2], [2, 1, 0]])
    scores = F.one_hot(targets, 3).float()
    scoring = check_scoring("accuracy", is_classification=True)
    assert measure(scores, targets, default_loss, scoring, np.arange(3))["accuracy"] == 1.0
    moved = scores.movedim(-1, 1)
    assert measure(moved, targets, F.cross_entropy, scoring, np.arange(3))["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("shape", "targets", "message"),
    [
        ((6, 4), torch.arange(12) % 2, r"\(6, 4\) for targets of shape \(12,\)"),
        ((6, 2), torch.arange(6) % 3, "hold 2 scores for each target, and the largest class is 2"),
        ((6, 1), torch.arange(6) % 3, r"hold one number for each target, and the classes are \[0, 1, 2\]"),
        ((2, 6), torch.rand(12), r"outputs of shape \(2, 6\) for targets of shape \(12,\)"),
    ],
    ids=["too few rows", "too few scores", "one number for three classes", "a regression"],
)
def test_outputs_that_do_not_fit_are_refused(
    shape: tuple[int, ...], targets: torch.Tensor, message: str
) -> None:
    is_classification = not targets.is_floating_point()
    classes = np.unique(targets.numpy()) if is_classification else np.empty(0)
    scoring = check_scoring("loss", is_classification=is_classification)
    with pytest.raises(ValueError, match=message):
        measure(torch.zeros(shape), targets, lambda o, t: o.sum(), scoring, classes)


@pytest.mark.parametrize("swap", [{7: 0, 9: 1}, {7: 9, 9: 7}], ids=str)
def test_a_target_transform_counts(swap: dict[int, int]) -> None:
    dataset = Pictures(target_transform=swap.__getitem__)
    wanted = [dataset[i][1] for i in range(len(dataset))]
    assert as_data(dataset, caller="test").targets.tolist() == wanted


def test_targets_that_the_samples_do_not_have_are_not_taken() -> None:
    class Shifted(Pictures):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            picture, label = super().__getitem__(index)
            return picture, label - 7

    assert as_data(Shifted(), caller="test").targets.tolist() == [0, 2] * 20


def test_targets_that_hold_are_taken_without_reading_every_sample() -> None:
    dataset = Pictures(num_samples=2000)
    state = torch.random.get_rng_state()
    assert as_data(dataset, caller="test").targets.tolist() == dataset.targets
    assert dataset.num_reads < 50
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: Subset(d, range(30)),
        lambda d: random_split(d, [30, 10], generator=torch.Generator().manual_seed(0))[0],
        lambda d: ConcatDataset([d, d]),
        lambda d: Subset(ConcatDataset([d, Subset(d, range(4))]), range(20)),
    ],
    ids=["itself", "Subset", "random_split", "ConcatDataset", "nested"],
)
def test_a_fingerprint_does_not_depend_on_a_random_transform(
    wrap: Callable[[Dataset[Any]], Dataset[Any]],
) -> None:
    prints = set()
    for seed in range(2):
        torch.manual_seed(seed)
        prints.add(as_data(wrap(Pictures(noisy)), caller="test").fingerprint())
    assert len(prints) == 1


def test_a_fingerprint_tells_other_inputs_and_other_targets() -> None:
    datasets = [
        Pictures(),
        Pictures(transform=torch.neg),
        Pictures(target_transform={7: 0, 9: 1}.__getitem__),
        Subset(Pictures(), range(38)),
    ]
    assert len({as_data(dataset, caller="test").fingerprint() for dataset in datasets}) == 4


def test_a_held_out_loss_of_nan_is_an_explosion() -> None:
    x = np.random.default_rng(0).normal(size=(120, 4)).astype("float32")
    space = {"lr": Float(1e38, 2e38), "batch_size": 200}
    tuner = TunerCV(lambda p: nn.Linear(4, 1), space, n_trials=2, cv=3, max_epochs=2)
    with pytest.raises(AllTrialsExplodedError):
        tuner.fit(x, x[:, 0].copy())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("X", (7, 2), r"X has (nan|inf) in row 7, column 2; expected finite numbers. Impute"),
        ("y", (5,), r"y has (nan|inf) in row 5; expected finite numbers. Drop the row"),
    ],
)
def test_bad_values_are_found_before_training(
    value: float, name: str, place: tuple[int, ...], message: str
) -> None:
    rng = np.random.default_rng(0)
    arrays = {"X": rng.normal(size=(60, 4)), "y": rng.normal(size=60)}
    arrays[name][place] = value

    def untrained(params: dict[str, Any]) -> nn.Module:
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"cross_validate: " + message):
        cross_validate(untrained, {"lr": 1e30}, arrays["X"], arrays["y"])
    with pytest.raises(ValueError, match=r"suggest_clip_range: " + message):
        suggest_clip_range(untrained, arrays["X"], arrays["y"])


def test_bad_values_are_caught_like_trials_that_all_explode() -> None:
    x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    y = x[:, 0].copy()
    y[3] = np.nan
    tuner = TunerCV(lambda p: nn.Linear(4, 1), {"lr": Float(0.01, 0.02)}, n_trials=2, cv=3, max_epochs=2)
    with pytest.raises(AllTrialsExplodedError, match="y has nan in row 3") as error:
        tuner.fit(x, y)
    assert error.value.explosions == []
    assert isinstance(error.value, ValueError)


def test_bad_pixel_is_named_with_all_its_places_and_the_number_of_rows() -> None:
    images = np.zeros((10, 1, 4, 4), dtype="float32")
    images[3, 0, 2, 1] = images[6, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"row 3, column \(0, 2, 1\) \(2 rows have such values\)"):
        cross_validate(lambda p: nn.Linear(4, 2), {}, images, np.arange(10) % 2)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="y has one class only, 3, in all 20 samples; expected at least two"):
        cross_validate(lambda p: nn.Linear(4, 4), {}, np.zeros((20, 4)), np.full(20, 3))
