"""Mini-batches, and the parts of them whose gradients are added up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tuner_cases as cases
from torch.utils.data import DataLoader, TensorDataset

from fastclip.tuner import AllTrialsFailedError, Choice, ExplosionRule, cross_validate
from fastclip.tuner.training.batching import num_steps, steps
from fastclip.tuner.training.losses import default_loss
from fastclip.tuner.training.reading import as_data
from fastclip.tuner.training.stepping import Stepper

CPU = torch.device("cpu")
PARAMS: dict[str, Any] = {"lr": 0.3, "max_norm": 0.5, "momentum": 0.9}


def sizes(num_rows: int, **params: int) -> list[list[int]]:
    """How many samples each part of each step has."""
    data = as_data(cases.blobs(num_rows), caller="test")
    found = [
        [len(targets) for _, targets, _ in parts] for parts in steps(data, np.arange(num_rows), params, CPU)
    ]
    assert len(found) == num_steps(num_rows, params, data)
    return found


def test_parts_are_mini_batches_and_the_last_step_has_those_that_are_left() -> None:
    assert sizes(16, batch_size=4, accumulate=2) == [[4, 4], [4, 4]]
    assert sizes(18, batch_size=4, accumulate=2) == [[4, 4], [4, 4], [2]]
    assert sizes(17, batch_size=4, accumulate=2) == [[4, 4], [4, 5]]  # a single sample joins those before it
    assert sizes(21, batch_size=4, accumulate=2) == [[4, 4], [4, 4], [5]]
    assert sizes(10, batch_size=4) == [[4], [4], [2]]
    assert sizes(6, batch_size=4, accumulate=8) == [[4, 2]]


def test_shares_are_those_of_the_samples_of_a_step() -> None:
    data = as_data(cases.blobs(30), caller="test")
    params = {"batch_size": 4, "accumulate": 3}
    shares = [[share for *_, share in parts] for parts in steps(data, np.arange(30), params, CPU)]
    assert shares == [[1 / 3] * 3, [1 / 3] * 3, [4 / 6, 2 / 6]]


def test_processes_that_read_give_the_same_parts() -> None:
    dataset = TensorDataset(*cases.blobs(30))
    params = {"batch_size": 4, "accumulate": 3}
    read = []
    for num_workers in (0, 1):
        data = as_data(DataLoader(dataset, num_workers=num_workers), caller="test")
        read.append(
            [(i, x, y, s) for i, ps in enumerate(steps(data, np.arange(30), params, CPU)) for x, y, s in ps]
        )
    for here, there in zip(*read, strict=True):
        assert (here[0], here[3]) == (there[0], there[3])
        assert torch.equal(here[1], there[1])
        assert torch.equal(here[2], there[2])
    assert len(read[0]) == 8


def trained(params: dict[str, Any], num_rows: int) -> tuple[torch.nn.Module, Stepper]:
    torch.manual_seed(0)
    model = cases.mlp({}).double()
    data = as_data(cases.blobs(), caller="test")
    stepper = Stepper(model, params, default_loss, ExplosionRule(), 10, device=CPU)
    for parts in steps(data, np.arange(num_rows), params, CPU):
        stepper.step((inputs.double(), targets, share) for inputs, targets, share in parts)
    return model, stepper


@pytest.mark.parametrize("num_rows", [64, 74], ids=["equal parts", "unequal last"])
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_accumulated_gradients_are_those_of_the_large_batch(num_rows: int, l2: float) -> None:
    params = {**PARAMS, "l2": l2}
    large, of_large = trained({**params, "batch_size": 32}, num_rows)
    parts, of_parts = trained({**params, "batch_size": 8, "accumulate": 4}, num_rows)
    assert of_parts.run.steps == of_large.run.steps == (2 if num_rows == 64 else 3)
    assert of_parts.norms == pytest.approx(of_large.norms, rel=1e-12)
    assert of_parts._losses == pytest.approx(of_large._losses, rel=1e-12)
    assert of_parts.run.clipped_steps == of_large.run.clipped_steps > 0
    for p, q in zip(parts.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    other, _ = trained({**params, "batch_size": 8}, num_rows)  # the test of this test
    assert not torch.allclose(next(other.parameters()), next(large.parameters()), rtol=1e-3)


def test_a_fold_with_it_is_that_of_the_large_batch() -> None:
    results = [
        cross_validate(cases.mlp, {**PARAMS, **params}, cases.blobs(), cv=2, max_epochs=4)
        for params in ({"batch_size": 24}, {"batch_size": 8, "accumulate": 3})
    ]
    assert results[0]["steps"].tolist() == results[1]["steps"].tolist() == [8, 8]
    for first, second in zip(*(result["history"] for result in results), strict=True):
        assert [e["train_loss"] for e in first] == pytest.approx([e["train_loss"] for e in second], rel=1e-4)


def test_it_may_be_searched_and_wrong_values_are_named() -> None:
    found = cases.tuner(
        space={"lr": 0.1, "accumulate": Choice([None, 2])}, sampler="grid", n_trials=None, refit=False
    ).fit(cases.blobs())
    steps_of = [record.folds[0].steps for record in found.records_]
    assert steps_of == [3 * 2, 3 * 1]  # of 45 samples in mini-batches of 32
    with pytest.raises(AllTrialsFailedError, match=r"accumulate=1\.5; expected a whole number of at least 1"):
        cases.tuner(space={"accumulate": 1.5}).fit(cases.blobs())
