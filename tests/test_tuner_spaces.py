import optuna
import pytest

from fastclip.tuner import Choice, Float, Int, Space
from fastclip.tuner.study.samplers import grid_points
from fastclip.tuner.study.spaces import resolve


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(1.0, 0.1), "low=1.0 is above high=0.1"),
        (lambda: Float(0.0, 1.0, log=True), "low=0.0; expected low > 0"),
        (lambda: Float(-1.0, 1.0, log=True), "expected low > 0"),
        (lambda: Float(0.0, float("inf")), "expected finite bounds"),
        (lambda: Float(0.0, 1.0, step=0.0), "expected a positive step"),
        (lambda: Float(0.1, 1.0, step=0.1, log=True), "expected one of the two"),
        (lambda: Int(5, 2), "low=5 is above high=2"),
        (lambda: Int(1, 8, step=2, log=True), "expected one of the two"),
        (lambda: Choice([]), "no options"),
    ],
)
def test_wrong_dimension_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_int_bounds_must_be_integers():
    with pytest.raises(TypeError, match=r"1\.5 is not an integer"):
        Int(1.5, 3)


def test_choice_of_objects_is_refused():
    with pytest.raises(TypeError, match="expected None, bool, int, float or str"):
        Choice([print])


def test_space_samples_dimensions_and_keeps_fixed_values():
    space = Space({"lr": Float(0.1, 0.2), "depth": Int(2, 4), "init": Choice(["a", "b"]), "momentum": 0.9})
    params = space.sample(optuna.trial.FixedTrial({"lr": 0.15, "depth": 3, "init": "b"}))
    assert params == {"lr": 0.15, "depth": 3, "init": "b", "momentum": 0.9}


def test_space_may_be_a_function_of_a_trial():
    space = Space(lambda trial: {"lr": trial.suggest_float("lr", 0.1, 1.0), "max_norm": None})
    assert space.sample(optuna.trial.FixedTrial({"lr": 0.5})) == {"lr": 0.5, "max_norm": None}


def test_product_of_rate_and_threshold_gives_the_rate():
    space = Space({"lr_x_max_norm": Float(0.01, 1.0), "max_norm": Float(0.1, 10.0)})
    params = space.sample(optuna.trial.FixedTrial({"lr_x_max_norm": 0.5, "max_norm": 4.0}))
    assert params["lr"] == 0.125


@pytest.mark.parametrize("max_norm", [None, Choice([None, 1.0])])
def test_product_needs_a_threshold(max_norm):
    with pytest.raises(ValueError, match="expected a threshold in every"):
        Space({"lr_x_max_norm": Float(0.01, 1.0), "max_norm": max_norm})


def test_product_excludes_the_rate():
    with pytest.raises(ValueError, match="both lr and lr_x_max_norm"):
        Space({"lr_x_max_norm": 1.0, "max_norm": 1.0, "lr": 0.1})


@pytest.mark.parametrize("max_norm", [None, 0.0])
def test_resolve_refuses_a_product_without_threshold(max_norm):
    with pytest.raises(ValueError, match="expected a positive threshold"):
        resolve({"lr_x_max_norm": 1.0, "max_norm": max_norm})


def test_space_of_another_type_is_refused():
    with pytest.raises(TypeError, match="expected a mapping"):
        Space([("lr", 0.1)])


def test_grid_has_every_combination():
    space = Space({"lr": Float(0.1, 0.3, step=0.1), "depth": Int(1, 2), "init": Choice(["x"]), "fixed": 3})
    points = grid_points(space)
    assert len(points) == 6
    assert [round(point["lr"], 9) for point in points] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert all(set(point) == {"lr", "depth", "init"} for point in points)


def test_grid_of_a_continuous_dimension_is_refused():
    with pytest.raises(ValueError, match="dimension 'lr' is continuous; expected a step or a Choice"):
        grid_points(Space({"lr": Float(0.1, 0.3)}))


def test_grid_has_a_limit():
    with pytest.raises(ValueError, match="1000000 points; expected at most"):
        grid_points(Space({name: Int(1, 100) for name in "abc"}))


def low(trial):
    return {"lr": trial.suggest_float("lr", 0.1, 0.5)}


def high(trial):
    return {"lr": trial.suggest_float("lr", 0.5, 1.0)}


def test_description_tells_spaces_apart():
    assert Space({"lr": Float(0.1, 1.0)}).describe() != Space({"lr": Float(0.1, 0.9)}).describe()
    assert Space({"lr": Float(0.1, 1.0)}).describe() == Space({"lr": Float(0.1, 1.0)}).describe()
    assert Space(low).describe() != Space(high).describe()
    assert "0.1, 0.5" in Space(low).describe()["function"], (
        "the source is part of it: an edit counts as a change"
    )
