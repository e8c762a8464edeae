"""A dataset is what it yields: transforms, collate functions, workers, and samples of every structure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tuner_cases as cases
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from fastclip.tuner import TunerCV, cross_validate, nested_cv
from fastclip.tuner.data import as_data
from fastclip.tuner.training.losses import default_loss
from fastclip.tuner.training.metrics import measure_batches
from fastclip.tuner.training.scoring import check_scoring

PADDING = 0


class Samples(Dataset[Any]):
    """Samples made by a function of the row."""

    def __init__(self, make: Any, num_samples: int = 60) -> None:
        self.make, self.num_samples = make, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, row: int) -> Any:
        return self.make(row)


X, Y = cases.blobs(60)


def pair(row: int) -> tuple[torch.Tensor, int]:
    return X[row], int(Y[row])


def augmented(row: int) -> tuple[torch.Tensor, int]:
    return X[row] + 5 * torch.rand(4), int(Y[row])


class TestStructure:
    class Sum(nn.Module):
        """Takes the features in two halves."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.cat((left, right), dim=1))

    @pytest.mark.parametrize(
        "make",
        [
            lambda row: (X[row, :2], X[row, 2:], int(Y[row])),
            lambda row: ((X[row, :2], X[row, 2:]), int(Y[row])),
            lambda row: ({"left": X[row, :2], "right": X[row, 2:]}, int(Y[row])),
            lambda row: {"left": X[row, :2], "right": X[row, 2:], "labels": int(Y[row])},
            lambda row: {"left": X[row, :2], "right": X[row, 2:], "target": int(Y[row])},
        ],
        ids=["three", "nested", "keywords", "labels", "target"],
    )
    def test_every_structure_gives_the_same_folds(self, make: Any) -> None:
        plain = cross_validate(lambda p: nn.Linear(4, 3), {"lr": 0.1}, (X, Y), cv=2, max_epochs=2)
        result = cross_validate(lambda p: self.Sum(), {"lr": 0.1}, Samples(make), cv=2, max_epochs=2)
        assert result["test_score"].tolist() == plain["test_score"].tolist()

    def test_lsuv_sees_keywords(self) -> None:
        data = Samples(lambda row: {"left": X[row, :2], "right": X[row, 2:], "labels": int(Y[row])})
        result = cross_validate(lambda p: self.Sum(), {"init": "lsuv", "lr": 0.1}, data, cv=2)
        assert result["status"].tolist() == ["ok"] * 2

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda row: {"pixels": X[row], "class": 1}, "keys pixels, class; expected one of labels, label"),
            (lambda row: X[row], "a sample is a Tensor; expected"),
        ],
    )
    def test_other_samples_are_refused(self, make: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            as_data(Samples(make), caller="fit")

    def test_names_that_a_dataset_yields_are_encoded(self) -> None:
        names = np.array(["cat", "dog", "owl"])
        data = Samples(lambda row: (X[row], str(names[Y[row]])))
        search = TunerCV(cases.mlp, {"lr": 0.1}, n_trials=1, cv=2, max_epochs=5).fit(data)
        assert set(search.predict(data)) == set(names)
        assert search.best_score_ > 0.8


class TestEvaluation:
    def test_is_without_augmentation(self) -> None:
        seen: list[torch.Tensor] = []

        class Watching(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if not self.training:
                    seen.append(x)
                return super().forward(x)

        cross_validate(
            lambda p: Watching(4, 3), {}, Samples(augmented), eval_data=Samples(pair), cv=2, max_epochs=1
        )
        known = {tuple(row) for row in X.tolist()}
        evaluated = [tuple(row) for batch in seen for row in batch.tolist()]
        assert len(evaluated) > 60
        assert set(evaluated) <= known

    def test_of_a_random_transform_is_the_same_every_time(self) -> None:
        # At a rate of 0 the model stays the same, and so must its scores.
        result = cross_validate(
            cases.mlp, {"lr": 0.0}, Samples(augmented), cv=2, max_epochs=3, scoring="loss"
        )
        for history in result["history"]:
            assert len({epoch["loss"] for epoch in history}) == 1

    def test_of_new_data_is_the_same_every_time(self) -> None:
        search = TunerCV(cases.mlp, {"lr": 0.1}, n_trials=1, cv=2, max_epochs=1, scoring="loss")
        search.fit(Samples(augmented))
        assert search.score(Samples(augmented)) == search.score(Samples(augmented))

    def test_measuring_leaves_the_randomness_of_training_alone(self) -> None:
        losses = [
            [epoch["train_loss"] for epoch in cross_validate(
                cases.dropping_out, {}, Samples(augmented), cv=2, max_epochs=2, **options
            )["history"][0]]
            for options in ({}, {"eval_data": Samples(pair)})
        ]  # fmt: skip
        assert losses[0] == losses[1]

    def test_nested_searches_measure_without_augmentation(self) -> None:
        options = {"space": {"lr": 0.1}, "outer_cv": 2, "cv": 2, "n_trials": 1, "max_epochs": 5}
        result = nested_cv(cases.mlp, data=Samples(augmented), eval_data=Samples(pair), **options)
        noisy = nested_cv(cases.mlp, data=Samples(augmented), **options)
        assert result["test_score"].mean() != noisy["test_score"].mean()

    def test_data_of_other_samples_is_refused(self) -> None:
        for other in (Samples(pair, 59), Samples(lambda row: (X[row], 0))):
            with pytest.raises(ValueError, match="eval_data has other targets than data"):
                as_data(Samples(pair), caller="fit", eval_data=other)
        with pytest.raises(TypeError, match="eval_data with X and y; expected both as a Dataset"):
            as_data(X, Y, caller="fit", eval_data=Samples(pair))


def pad(samples: list[tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill sequences up, and tags with what cross-entropy ignores."""
    tokens, targets = zip(*samples, strict=True)
    padded = nn.utils.rnn.pad_sequence(list(tokens), batch_first=True, padding_value=PADDING)
    if isinstance(targets[0], torch.Tensor):
        return padded, nn.utils.rnn.pad_sequence(list(targets), batch_first=True, padding_value=-100)
    return padded, torch.tensor(targets)


def sentence(row: int) -> torch.Tensor:
    """Between 2 and 6 tokens from 1 to 4, all the same."""
    return torch.full((2 + row % 5,), 1 + row % 4)


class Mean(nn.Module):
    """Classifies a sentence by the mean of its embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8, padding_idx=PADDING)
        self.layer = nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(tokens).sum(dim=1) / (tokens != PADDING).sum(dim=1, keepdim=True))


class TestLoader:
    def test_sequences_of_different_length_are_padded(self) -> None:
        loader = DataLoader(Samples(lambda row: (sentence(row), row % 4)), collate_fn=pad)
        result = cross_validate(lambda p: Mean(), {"lr": 0.5, "batch_size": 8}, loader, cv=2, max_epochs=15)
        assert result["mean_test_score"] == 1.0

    def test_tags_of_different_length_are_scored_without_their_padding(self) -> None:
        loader = DataLoader(Samples(lambda row: (sentence(row), sentence(row) - 1)), collate_fn=pad)
        result = cross_validate(
            lambda p: nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4)), {"lr": 1.0, "batch_size": 8},
            loader, cv=2, max_epochs=20,
        )  # fmt: skip
        assert result["mean_test_score"] == 1.0
        assert np.sum(result["confusion"]) == sum(len(sentence(row)) for row in range(60))

    def test_batches_of_different_length_have_the_loss_of_all_targets(self) -> None:

        generator = torch.Generator().manual_seed(0)
        batches = [
            (torch.randn(n, t, 3, generator=generator), torch.randint(3, (n, t), generator=generator))
            for n, t in ((4, 5), (2, 7))
        ]
        scoring = check_scoring("loss", is_classification=True)
        values, _ = measure_batches(batches, default_loss, scoring, np.arange(3))
        rows = torch.cat([outputs.reshape(-1, 3) for outputs, _ in batches])
        flat = torch.cat([targets.reshape(-1) for _, targets in batches])
        assert values["loss"] == pytest.approx(nn.functional.cross_entropy(rows, flat).item())
        assert values["accuracy"] == (rows.argmax(1) == flat).double().mean().item()

    @pytest.mark.parametrize("num_samples", [60, 3])
    def test_a_list_of_samples_is_a_dataset_of_a_loader(self, num_samples: int) -> None:
        rows = [(sentence(row), row % 4) for row in range(num_samples)]
        view = as_data(DataLoader(rows, collate_fn=pad), caller="fit")
        assert view.targets.tolist() == [row % 4 for row in range(num_samples)]
        tokens, _ = view.batch(np.array([0, 2]), torch.device("cpu"))
        assert tokens.tolist() == [[1, 1, PADDING, PADDING], [3, 3, 3, 3]]

    def test_sequences_of_different_length_go_from_search_to_prediction(self) -> None:
        def loader(num_samples: int) -> DataLoader[Any]:
            return DataLoader(
                Samples(lambda row: (sentence(row), row % 4), num_samples), collate_fn=pad, batch_size=8
            )

        search = TunerCV(
            lambda p: Mean(), {"lr": [0.3, 0.5]}, sampler="grid", n_trials=None, cv=2, max_epochs=15
        )
        search.fit(loader(60))
        new = loader(20)
        assert search.predict(new).tolist() == [row % 4 for row in range(20)]
        assert search.score(new) == 1.0
        assert search.outputs(new).shape == (20, 4)
        np.testing.assert_allclose(search.predict_proba(new).sum(axis=1), 1.0, rtol=1e-12)

    def test_samples_that_need_padding_are_told(self) -> None:
        result = cross_validate(lambda p: Mean(), {}, Samples(lambda row: (sentence(row), row % 4)), cv=2)
        assert "Give a DataLoader whose collate_fn pads them" in result["message"][0]
        with pytest.raises(ValueError, match="X has rows of different length"):
            as_data([sentence(row).tolist() for row in range(9)], list(range(9)), caller="fit")

    def test_batch_size_of_the_loader_holds_unless_searched(self) -> None:
        steps = [
            cross_validate(
                cases.mlp, params, DataLoader(TensorDataset(X, Y), batch_size=10), cv=2, max_epochs=1
            )["steps"].tolist()
            for params in ({}, {"batch_size": 15})
        ]  # fmt: skip
        assert steps == [[3, 3], [2, 2]]

    def test_worker_processes_read_the_same(self) -> None:
        results = [
            cross_validate(
                cases.mlp, {}, DataLoader(Samples(pair), num_workers=workers), cv=0.3,
                max_epochs=1, scoring="loss",
            )["test_score"].tolist()
            for workers in (0, 1)
        ]  # fmt: skip
        assert results[0] == results[1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"drop_last": True}, "drop_last=True; expected False"),
            (
                {"sampler": WeightedRandomSampler([1.0] * 60, 60)},
                "has a WeightedRandomSampler; expected none",
            ),
            ({"batch_sampler": [[0, 1]]}, "has a batch_sampler; expected none"),
        ],
        ids=["drop_last", "sampler", "batch_sampler"],
    )
    def test_settings_that_folds_cannot_follow_are_refused(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            as_data(DataLoader(TensorDataset(X, Y), **options), caller="fit")

    def test_workers_within_workers_are_refused(self) -> None:
        loader = DataLoader(Samples(pair), num_workers=1)
        with pytest.raises(ValueError, match=r"n_jobs=2 with a DataLoader of num_workers=1; expected one"):
            TunerCV(cases.mlp, {"lr": 0.1}, n_trials=1, n_jobs=2).fit(loader)
