"""What a drop-in must honour: each case beside torch itself."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BY_NAME, DTYPES, dtype_id, parameters_of, present, select
from torch.nn import utils

import fastclip

NAMES = ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def assert_same(got: torch.Tensor, want: torch.Tensor, rtol: float) -> None:
    # Two roundings apart where the dtype is subnormal.
    atol = 2 * torch.finfo(want.dtype).smallest_normal * torch.finfo(want.dtype).eps
    torch.testing.assert_close(
        got, want, rtol=rtol, atol=atol, equal_nan=True, check_dtype=False, check_stride=True
    )


def rtol_of(dtype: torch.dtype) -> float:
    """What torch's own rounding of the norm and of the coefficient to the gradients' dtype may cost."""
    return max(1e-6, 4 * torch.finfo(dtype).eps) if dtype != torch.float64 else 1e-12


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or the exception."""
    try:
        return call()
    except Exception as error:
        return error


def assert_same_outcome(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), f"{ours!r} instead of {theirs!r}"
        assert str(theirs).splitlines()[0] in str(ours)
    else:  # torch's float32 sums are the less exact ones
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    def shape(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(getattr(fastclip, name)) == shape(getattr(utils, name))


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


# Where torch's norm leaves its dtype or loses accuracy, fastclip's is another and the oracle decides.
COMPARABLE = [
    case
    for case in select()
    if case.name not in ("large", "small", "four_times_large", "large_and_small", "subnormal", "largest")
]


@every_dtype
@pytest.mark.parametrize("case", COMPARABLE, ids=lambda case: case.name)
def test_clipping(dtype: torch.dtype, case: Any) -> None:
    """Values, return, layout, aliases: nothing, None, empty, nan, inf, mixed dtypes, duplicates, views."""
    # torch measures 16-bit gradients in their dtype, which costs it up to an eps per sum.
    rtol = 8 * rtol_of(torch.bfloat16 if case.name == "mixed_dtypes" else dtype)
    for max_norm in (0.5, 1e4):
        ours, theirs = case.parameters("cpu", dtype), case.parameters("cpu", dtype)
        norm, torch_norm = fastclip.clip_grad_norm_(ours, max_norm), utils.clip_grad_norm_(theirs, max_norm)
        assert_same(norm, torch_norm, rtol)
        half = (torch.bfloat16, torch.float16)
        assert norm.dtype == (torch.float32 if torch_norm.dtype in half else torch_norm.dtype)
        for p, q in zip(ours, theirs, strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert_same(p.grad, q.grad, 2 * rtol)


@every_dtype
@pytest.mark.parametrize("case", select(aliased=True), ids=lambda case: case.name)
def test_shared_memory_is_counted_and_scaled_as_often_as_given(
    backend: str, dtype: torch.dtype, case: Any
) -> None:
    expected = case.parameters("cpu", dtype)
    norm = fastclip.get_total_norm([p.grad for p in expected]).to(torch.float64)
    with torch.no_grad():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for p in expected:
            p.grad.mul_((0.5 / (norm + 1e-6)).to(wide))
    for _ in range(3):
        parameters = case.parameters("cpu", dtype)
        fastclip.clip_grad_norm_(parameters, 0.5)
        for p, q in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("name", ["nan", "inf", "inf_then_nan", "minus_inf"])
@every_dtype
def test_nonfinite_norms(backend: str, dtype: torch.dtype, name: str) -> None:
    ours, theirs = BY_NAME[name].parameters("cpu", dtype), BY_NAME[name].parameters("cpu", dtype)
    assert_same(fastclip.clip_grad_norm_(ours, 1.0), utils.clip_grad_norm_(theirs, 1.0), 0)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("parameters", [[], (), {}, [None]], ids=["list", "tuple", "dict", "none"])
@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_nothing_to_clip(backend: str, name: str, parameters: Any) -> None:
    if parameters == [None]:
        parameters = [torch.nn.Parameter(torch.zeros(2))]
    ours = outcome(lambda: getattr(fastclip, name)(parameters, 1.0)) if backend == "eager" else None
    with fastclip.use_backend("auto"):
        ours = ours or outcome(lambda: getattr(fastclip, name)(parameters, 1.0))
    assert_same_outcome(ours, outcome(lambda: getattr(utils, name)(parameters, 1.0)))


def test_no_gradient_has_norm_zero(backend: str) -> None:
    for norm in (fastclip.get_total_norm([]), fastclip.clip_grad_norm_([], 1.0)):
        assert (norm.item(), norm.dtype, norm.device.type, norm.dim()) == (0.0, torch.float32, "cpu", 0)


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
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
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


def test_expanded_gradients_raise() -> None:
    for module in (fastclip, utils):
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            parameters = parameters_of([torch.ones(1).expand(4)])
            with pytest.raises(RuntimeError, match="single memory location"):
                getattr(module, name)(parameters, 0.5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=dtype_id)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_complex(dtype: torch.dtype, norm_type: float) -> None:
    values = torch.randn(20, dtype=dtype, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        parameters_of([values.clone(), torch.ones(3)]),
        parameters_of([values.clone(), torch.ones(3)]),
    )
    assert_same_outcome(
        fastclip.clip_grad_norm_(ours, 0.5, norm_type), utils.clip_grad_norm_(theirs, 0.5, norm_type)
    )
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=dtype_id)
@pytest.mark.parametrize("name", ["get_total_norm", "clip_grad_norm_", "clip_grad_value_"])
def test_integers(name: str, dtype: torch.dtype) -> None:
    class HasGrad:
        def __init__(self) -> None:
            self.grad = torch.ones(3, dtype=dtype)

    outcomes = []
    for module in (fastclip, utils):
        argument: list[Any] = [torch.ones(3, dtype=dtype)] if name == "get_total_norm" else [HasGrad()]
        outcomes.append(outcome(lambda: getattr(module, name)(argument, 2.0)))  # noqa: B023
    if not isinstance(outcomes[1], Exception):
        assert_same_outcome(*outcomes)
    else:
        assert isinstance(outcomes[0], type(outcomes[1]))


def test_torch_gives_up_where_fastclip_is_right() -> None:
    """The first and second intended difference: finite gradients that torch zeroes or measures roughly."""
    ours, theirs = parameters_of([torch.full((4,), 6e31)]), parameters_of([torch.full((4,), 6e31)])
    assert fastclip.clip_grad_norm_(ours, 1.0).item() == pytest.approx(1.2e32, rel=1e-7)
    assert utils.clip_grad_norm_(theirs, 1.0).item() == math.inf
    assert ours[0].grad.tolist() == pytest.approx([0.5] * 4, rel=1e-6)
    assert theirs[0].grad.tolist() == [0.0] * 4
    half = torch.full((1001,), 1.0, dtype=torch.bfloat16)
    assert fastclip.get_total_norm([half]).item() == pytest.approx(1001**0.5, rel=1e-7)
    assert fastclip.get_total_norm([half]).dtype == torch.float32


def test_infinite_max_norm_differs_from_torch_only_where_the_norm_is_not_finite() -> None:
    """The third intended difference."""
    ours, theirs = (
        parameters_of([torch.tensor([math.inf, 1.0])]),
        parameters_of([torch.tensor([math.inf, 1.0])]),
    )
    assert fastclip.clip_grad_norm_(ours, math.inf) == utils.clip_grad_norm_(theirs, math.inf) == math.inf
    assert ours[0].grad.tolist() == [math.inf, 1.0]
    assert theirs[0].grad.isnan().all()


def test_create_graph(backend: str) -> None:
    for module in (fastclip, utils):
        weight = torch.tensor([3.0, 4.0], requires_grad=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
            (weight**3).sum().backward(create_graph=True)
        grad = weight.grad
        version = grad._version
        norm = module.clip_grad_norm_([weight], 1.0)
        assert not norm.requires_grad
        assert grad._version > version
        assert grad.requires_grad
        assert grad.norm().item() == pytest.approx(1.0, rel=1e-5)
        weight.grad = None


def test_the_norm_carries_no_graph(backend: str) -> None:
    tensor = torch.tensor([3.0, 4.0], requires_grad=True)
    for module in (fastclip, utils):
        assert not module.get_total_norm([tensor * 1.0]).requires_grad


def test_present_gradients_decide_the_dtype(backend: str) -> None:
    for dtypes in (
        [torch.float32, torch.float64],
        [torch.bfloat16, torch.float32],
        [torch.float16, torch.float64],
    ):
        parameters = parameters_of([None, *(torch.ones(2, dtype=d) for d in dtypes)])
        ours, theirs = fastclip.clip_grad_norm_(parameters, 9.0), utils.clip_grad_norm_(parameters, 9.0)
        assert (ours.dtype, ours.item()) == (theirs.dtype, 2.0)
        assert len(present(p.grad for p in parameters)) == 2
