"""What a drop-in must honour: which arguments are taken and refused, each beside torch itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BY_NAME, parameters_of
from contract_comparison import assert_same, assert_same_outcome, outcome
from programs import run_python
from torch.nn import utils

import fastclip

NAMES = ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_")


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    def shape(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    ours, theirs = shape(getattr(fastclip, name)), shape(getattr(utils, name))
    assert ours[: len(theirs)] == theirs
    # What torch has not is for ranks alone, and by keyword alone.
    further = {entry[0]: entry[1] for entry in ours[len(theirs) :]}
    assert further in ({}, dict.fromkeys(("group", "mesh"), inspect.Parameter.KEYWORD_ONLY))


def test_by_position_and_by_keyword(backend: str) -> None:
    for module in (fastclip, utils):
        (p,) = parameters_of([torch.tensor([3.0, 4.0])])
        assert module.clip_grad_norm_([p], 10.0, 2.0, False, None) == 5.0
        norm = module.clip_grad_norm_(
            parameters=[p], max_norm=10.0, norm_type=2.0, error_if_nonfinite=True, foreach=None
        )
        assert norm == 5.0
        assert module.get_total_norm([p.grad], 1.0, False, None) == 7.0
        assert module.get_total_norm(tensors=[p.grad], norm_type=math.inf) == 4.0
        assert module.clip_grads_with_norm_([p], 10.0, norm, None) is None
        assert (
            module.clip_grads_with_norm_(parameters=[p], max_norm=2.5, total_norm=norm, foreach=None) is None
        )
        assert p.grad.tolist() == pytest.approx([1.5, 2.0], rel=1e-6)
        assert module.clip_grad_value_([p], 1.75, None) is None
        assert module.clip_grad_value_(parameters=[p], clip_value=1.75, foreach=None) is None
        assert p.grad.tolist() == pytest.approx([1.5, 1.75], rel=1e-6)


@pytest.mark.parametrize("parameters", [[], (), {}, [None]], ids=["list", "tuple", "dict", "none"])
@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_nothing_to_clip(backend: str, name: str, parameters: Any) -> None:
    if parameters == [None]:
        parameters = [torch.nn.Parameter(torch.zeros(2))]
    ours = outcome(lambda: getattr(fastclip, name)(parameters, 1.0)) if backend == "eager" else None
    with fastclip.use_backend("auto"):
        ours = ours or outcome(lambda: getattr(fastclip, name)(parameters, 1.0))
    assert_same_outcome(ours, outcome(lambda: getattr(utils, name)(parameters, 1.0)))


def test_an_empty_generator_warns(backend: str) -> None:
    text = "`parameters` is an empty generator, no gradient clipping will occur."
    for module in (fastclip, utils):
        with pytest.warns(UserWarning, match=text) as caught:
            assert module.clip_grad_norm_((p for p in []), 1.0) == 0.0
        assert caught[0].filename == __file__


def as_generator(parameters: list[Any]) -> Any:
    return (p for p in parameters)


class Reiterable:
    def __init__(self, parameters: list[Any]) -> None:
        self.parameters = parameters

    def __getitem__(self, index: int) -> Any:
        return self.parameters[index]


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        as_generator,
        lambda ps: dict(enumerate(ps)).values(),
        iter,
        set,
        Reiterable,
        torch.nn.ParameterList,
    ],
    ids=["list", "tuple", "generator", "dict_values", "iterator", "set", "getitem", "ParameterList"],
)
def test_any_iterable(backend: str, form: Callable[[list[Any]], Any]) -> None:
    for name, argument in (("clip_grad_norm_", 0.5), ("clip_grad_value_", 0.1)):
        ours, theirs = (BY_NAME["shapes"].parameters("cpu", torch.float32) for _ in range(2))
        getattr(fastclip, name)(form(ours), argument)
        getattr(utils, name)(form(theirs), argument)
        for p, q in zip(ours, theirs, strict=True):
            assert_same(p.grad, q.grad, 1e-6)


def test_one_tensor(backend: str) -> None:
    for module in (fastclip, utils):
        (p,) = parameters_of([torch.tensor([[3.0], [4.0]])])
        assert module.clip_grad_norm_(p, 1.0) == 5.0
        assert p.grad.flatten().tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
        module.clip_grad_value_(p, 0.7)
        assert module.get_total_norm(p.grad, math.inf).item() == pytest.approx(0.7, rel=1e-6)


@pytest.mark.filterwarnings("ignore:fastclip. max_norm is negative")
@pytest.mark.parametrize(
    "max_norm",
    ["1.0", torch.tensor(1.0), 1, True, 0, 0.0, -1, math.nan, math.inf, 5.0, 1e-40, None, "one", [1.0]],
    ids=str,
)
def test_max_norm(backend: str, max_norm: Any) -> None:
    outcomes = []
    for module in (fastclip, utils):
        parameters = parameters_of([torch.tensor([3.0, -4.0]), torch.tensor(0.0)])
        result = outcome(lambda: module.clip_grad_norm_(parameters, max_norm))  # noqa: B023
        outcomes.append((result, torch.cat([p.grad.reshape(-1) for p in parameters])))
    (ours, our_grads), (theirs, their_grads) = outcomes
    assert_same_outcome(ours, theirs)
    assert_same(our_grads, their_grads, 1e-6)


def test_negative_max_norm_warns_once() -> None:
    code = """
import torch, fastclip, warnings
warnings.simplefilter("always")
p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.ones(2)
with warnings.catch_warnings(record=True) as caught:
    for _ in range(3): fastclip.clip_grad_norm_([p], -1.0)
    fastclip.clip_grads_with_norm_([p], -1.0, torch.tensor(1.0))
print([str(w.message) for w in caught], caught[0].filename)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("max_norm is negative") == 1
    assert done.stdout.strip().endswith("<string>")


NORM_TYPES = (
    2,
    "2",
    "inf",
    math.inf,
    -math.inf,
    "-inf",
    0,
    0.0,
    1,
    "1.5",
    0.5,
    3,
    -1,
    -2.5,
    math.nan,
    True,
    None,
    "x",
    [2],
)


@pytest.mark.parametrize("norm_type", NORM_TYPES, ids=repr)
@pytest.mark.parametrize("name", ["shapes", "zeros", "some_empty", "nan", "inf"])
def test_norm_type(name: str, norm_type: Any) -> None:
    outcomes = []
    for module in (fastclip, utils):
        parameters = BY_NAME[name].parameters("cpu", torch.float32)
        result = outcome(lambda: module.clip_grad_norm_(parameters, 0.5, norm_type))  # noqa: B023
        outcomes.append((result, [p.grad for p in parameters]))
    (ours, our_grads), (theirs, their_grads) = outcomes
    if isinstance(theirs, Exception):
        assert isinstance(ours, Exception)
    assert_same_outcome(ours, theirs)
    for got, want in zip(our_grads, their_grads, strict=True):
        assert_same(got, want, 1e-5)


@pytest.mark.parametrize("error_if_nonfinite", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("name", ["nan", "inf", "shapes", "zeros"])
def test_error_if_nonfinite(name: str, norm_type: float, error_if_nonfinite: bool) -> None:
    outcomes = []
    for module in (fastclip, utils):
        tensors = BY_NAME[name].tensors("cpu", torch.float32)
        outcomes.append(outcome(lambda: module.get_total_norm(tensors, norm_type, error_if_nonfinite)))  # noqa: B023
    assert_same_outcome(*outcomes)


@pytest.mark.parametrize("foreach", [True, False])
def test_foreach(foreach: bool) -> None:
    for name, argument in (("clip_grad_norm_", 0.5), ("clip_grad_value_", 0.1)):
        ours, theirs = (BY_NAME["shapes"].parameters("cpu", torch.float32) for _ in range(2))
        getattr(fastclip, name)(ours, argument, foreach=foreach)
        getattr(utils, name)(theirs, argument, foreach=foreach)
        for p, q in zip(ours, theirs, strict=True):
            assert_same(p.grad, q.grad, 1e-6)


def test_foreach_false_selects_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("the kernels ran")

    monkeypatch.setattr("fastclip.backends.cpu.total_norm", refuse)
    assert fastclip.get_total_norm([torch.tensor([3.0, 4.0])], foreach=False) == 5.0
    with pytest.raises(AssertionError, match="the kernels ran"):
        fastclip.get_total_norm([torch.tensor([3.0, 4.0])])


def test_foreach_true_where_it_cannot_be_had() -> None:
    message = "foreach=True was passed, but can't use the foreach API on meta tensors"
    for module in (fastclip, utils):
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            with pytest.raises(RuntimeError, match=message):
                getattr(module, name)(parameters_of([torch.ones(3, device="meta")]), 1.0, foreach=True)
