"""Each strategy beside its formula in plain Python, and what all strategies have in common."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import strategy_oracle as oracle
import torch
from strategy_cases import OF_EACH, REMEMBERING, STRATEGIES, norms, of_norm
from triton_interpreter import interpreted, needs_triton, noted_launches

import fastclip
from fastclip import strategies
from fastclip.strategies import Gradients, Strategy, percentile
from fastclip.strategies.within import Elements

__all__ = ["interpreted"]

FORMULAS: list[tuple[Strategy, Callable[[Sequence[float]], float]]] = [
    (strategies.Percentile(10), oracle.percentile(10, None)),
    (strategies.Percentile(90, window=20), oracle.percentile(90, 20)),
    (strategies.Percentile(50, window=30, warmup=7), oracle.percentile(50, 30, 7)),
    (strategies.Percentile(100, warmup=3), oracle.percentile(100, None, 3)),
    (strategies.MedianMAD(), oracle.median_mad(4, 128, 20)),
    (strategies.MedianMAD(2.5, window=11, warmup=4), oracle.median_mad(2.5, 11, 4)),
    (strategies.ZScore(), oracle.zscore(0.97, 2.5, 25)),
    (strategies.ZScore(0.9, 1.5, 5, math.inf), oracle.zscore(0.9, 1.5, 5, math.inf)),
    (strategies.MedianMAD(3, 40, 30, math.inf), oracle.median_mad(3, 40, 30, math.inf)),
    (strategies.QuantileServo(), oracle.quantile_servo(0.5, 0.2)),
    (strategies.QuantileServo(0.9, 0.05), oracle.quantile_servo(0.9, 0.05)),
    (strategies.Ema(), oracle.ema(1.05, 0.98, 100, 1.0)),
    (strategies.Ema(2.0, 0.9, 5, math.inf), oracle.ema(2.0, 0.9, 5, math.inf)),
]


@pytest.mark.parametrize(("strategy", "formula"), FORMULAS, ids=[repr(s) for s, _ in FORMULAS])
def test_threshold_is_that_of_the_formula(strategy: Strategy, formula: Any) -> None:
    strategy = copy.deepcopy(strategy)
    sequence = norms()
    clipped = 0
    for step, norm in enumerate(sequence, 1):
        decision = strategy.decide(of_norm(norm))
        if not math.isfinite(norm):
            continue
        expected = formula(sequence[:step])
        assert float(decision.threshold) == pytest.approx(expected, rel=1e-9), f"step {step}"  # type: ignore[arg-type]
        coef = min(1.0, expected / (norm + 1e-6))
        assert float(decision.coefs) == pytest.approx(coef, rel=1e-9)
        clipped += coef < 1
    assert clipped > 0


WITH_KERNELS = [
    strategies.MedianMAD(2.5, window=11, warmup=4),
    strategies.Percentile(37, window=8, warmup=3),
    strategies.Percentile(37, warmup=3),
    strategies.QuantileServo(0.9, 0.05),
    strategies.ZScore(0.9, 1.5, 5),
    strategies.Ema(1.2, 0.9, 5, 2.0),
    strategies.NormStabilised(),
    strategies.NormStabilised(limit=1.2),
]
"""With short windows: to interpret a sort is slow."""


@needs_triton
@pytest.mark.parametrize("strategy", WITH_KERNELS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_a_device_learns_the_same_in_one_launch(
    strategy: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = noted_launches(monkeypatch)
    ours, theirs = copy.deepcopy(strategy), copy.deepcopy(strategy)
    sequence = torch.tensor(norms(22)).to(dtype)
    for step, norm in enumerate(sequence):
        skipped = torch.tensor(step % 7 == 3)
        seen = torch.where(skipped, math.nan, norm.double())
        if getattr(strategy, "predicts", False):
            found = [ours.threshold(norm.double()).clone()]
            ours.learn(norm, skipped)
            with fastclip.use_backend("cpu"):
                expected = [theirs.threshold(norm.double()).clone()]
                theirs.learn(seen)
        else:
            param = torch.nn.Parameter(torch.zeros(1))
            gradients = Gradients([param], seen, norms=seen.reshape(1))
            decision = ours.decide(gradients)
            found = [decision.threshold, decision.coefs]
            with fastclip.use_backend("cpu"):
                decision = theirs.decide(gradients)
            expected = [decision.threshold, decision.coefs]
            if not seen.isfinite():  # for which there is no threshold
                found, expected = found[1:], expected[1:]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)
    states = [list(s.state_dict().values())[1:] for s in (ours, theirs)]
    torch.testing.assert_close(*states, rtol=1e-12, atol=0, equal_nan=True)
    assert len(launches) == len(sequence)


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_a_history_grows_over_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclip.kernels import thresholds

    monkeypatch.setattr(percentile, "_FIRST_CAPACITY", 4)
    monkeypatch.setattr(thresholds, "HISTORY_PER_PROGRAM", 8)
    launches = noted_launches(monkeypatch)
    strategy, formula = strategies.Percentile(60), oracle.percentile(60, None)
    sequence = norms(40)
    for step, norm in enumerate(sequence, 1):
        found = float(strategy.decide(of_norm(norm)).threshold)  # type: ignore[arg-type]
        if math.isfinite(norm):
            assert found == pytest.approx(formula(sequence[:step]), rel=1e-12), f"step {step}"
        if step == 20:  # as a checkpoint does
            strategy.load_state_dict(strategy.state_dict())
    state = strategy.state_dict()
    assert state["history"].numel() == 64
    assert state["history"][: int(state["size"])].tolist() == sorted(n for n in sequence if math.isfinite(n))
    assert len(launches) == len(sequence)


@pytest.mark.parametrize("limit", [math.inf, 3.0])
def test_norm_stabilised_is_that_of_the_formula(limit: float) -> None:
    strategy = strategies.NormStabilised(limit=limit)
    formula = oracle.norm_stabilised(0.7, 0.9, 1e-6, limit)
    sequence = norms()
    for step, norm in enumerate(sequence, 1):
        found = strategy.decide(of_norm(norm)).coefs
        if math.isfinite(norm):
            assert float(found) == pytest.approx(formula(sequence[:step]), rel=1e-9)


def test_ema_of_each_is_that_of_the_total_norm_of_one() -> None:
    """Of two parameters with other norms each has the threshold of its own, once beyond the warm-up."""
    strategy = strategies.Ema(warmup=5, warmup_max_norm=math.inf, per_tensor=True)
    formula = oracle.ema(1.05, 0.98, 5, math.inf)
    sequences = norms(seed=1), norms(seed=2)
    both: list[tuple[float, float]] = []
    for pair in zip(*sequences, strict=True):
        params = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in pair]
        for param, norm in zip(params, pair, strict=True):
            param.grad = torch.tensor([norm], dtype=torch.float64)
        coefs = strategy.decide(Gradients(params, torch.tensor(math.hypot(*pair), dtype=torch.float64))).coefs
        if not all(map(math.isfinite, pair)):
            continue
        both.append(pair)
        for number, norm in enumerate(pair):
            limit = formula([pair[number] for pair in both])
            assert float(coefs[number]) == pytest.approx(min(1.0, limit / (norm + 1e-6)), rel=1e-9)


def test_schedule_counts_steps() -> None:
    strategy = strategies.Schedule(lambda step: 1.0 + step)
    assert [float(strategy.decide(of_norm(9.0)).threshold) for _ in range(3)] == [1.0, 2.0, 3.0]  # type: ignore[arg-type]


def test_a_history_of_thousands_of_norms() -> None:
    strategy, formula = strategies.Percentile(30), oracle.percentile(30, None)
    sequence = norms(2500, seed=4)
    for step, norm in enumerate(sequence, 1):
        found = strategy.decide(of_norm(norm)).threshold
        if step % 250 == 0:
            assert float(found) == pytest.approx(formula(sequence[:step]), rel=1e-9)  # type: ignore[arg-type]


def gradients_of(values: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.ones_like(value)) for value in values]
    for param, value in zip(params, values, strict=True):
        param.grad = value.clone()
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rules_for_each_tensor(dtype: torch.dtype) -> None:
    values = [
        torch.full((4, 4), 3.0, dtype=dtype),
        torch.full((9,), 0.1, dtype=dtype),
        torch.zeros(2, dtype=dtype),
    ]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for strategy, expected in (
        (strategies.PerTensor(1.0), (0.25, 0.1)),
        (strategies.BlockRMS(1.0), (1.0, 0.1)),
        (strategies.Value(0.5), (0.5, 0.1)),
    ):
        params = gradients_of(values)
        norm = strategy.clip_grad_norm_(params)
        assert float(norm) == pytest.approx(math.sqrt(16 * 9 + 9 * 0.01), rel=tolerance)
        for param, element in zip(params, (*expected, 0.0), strict=True):
            torch.testing.assert_close(param.grad, torch.full_like(param, element), rtol=tolerance, atol=0)


def test_a_scale_is_no_part_of_the_limit() -> None:
    """What `Value` does where a step is not folded: as clamping what is unscaled."""
    params = gradients_of([torch.tensor([-3.0, 0.25, 2.0]) * 8, torch.tensor([0.5]) * 8])
    Elements(1.0).clip_(params, torch.tensor(8.0))
    torch.testing.assert_close(params[0].grad, torch.tensor([-8.0, 2.0, 8.0]))
    torch.testing.assert_close(params[1].grad, torch.tensor([4.0]))


def test_agc_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv": (4, 3, 2, 2), "weight": (5, 6), "bias": (7,), "head": (3, 3), "gain": ()}
    named = []
    for name, shape in shapes.items():
        param = torch.nn.Parameter(torch.randn(shape, generator=generator))
        param.grad = torch.randn(shape, generator=generator)
        named.append((name, param))
    with torch.no_grad():
        named[1][1][2] = 0.0  # a unit whose weights are zero still moves
        named[1][1].grad[3] = 0.0  # type: ignore[index]
    before = {name: p.grad.clone() for name, p in named if p.grad is not None}
    strategies.AGC(0.02, 1e-3, exclude="he*").clip_grad_norm_(iter(named))
    for name, param in named:
        assert param.grad is not None
        for unit in range(param.shape[0] if param.dim() > 1 else 1):
            at = unit if param.dim() > 1 else ...
            weight, grad = param.detach()[at].double(), before[name][at].double()
            limit = 0.02 * max(float(weight.norm()), 1e-3)
            size = float(grad.norm())
            expected = grad if name == "head" or size <= limit else grad * (limit / size)
            torch.testing.assert_close(param.grad[at].double(), expected, rtol=1e-6, atol=1e-12)
    assert float(named[1][1].grad[2].norm()) == pytest.approx(0.02 * 1e-3, rel=1e-5)  # type: ignore[index]


def test_agc_wants_names_to_exclude_by() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"AGC: exclude is given.*named_parameters"):
        strategies.AGC(exclude="head.*").clip_grad_norm_([param])


def test_skip_says_which_steps_are_outliers() -> None:
    strategy = strategies.Skip(strategies.MedianMAD(window=16, warmup=5), factor=2.0)
    formula = oracle.median_mad(4, 16, 5)
    sequence = norms()
    found = []
    for step, norm in enumerate(sequence, 1):
        decision = strategy.decide(of_norm(norm))
        if math.isfinite(norm):
            limit = formula(sequence[:step])
            assert bool(decision.outlier) == (norm > 2 * limit)
            assert float(decision.coefs) == pytest.approx(
                1.0 if norm > 2 * limit else min(1.0, limit / (norm + 1e-6))
            )
            found.append(bool(decision.outlier))
    assert 0 < sum(found) < len(found)


@needs_triton
@pytest.mark.parametrize("inner", [strategies.MedianMAD(1.0, 8, 3), strategies.ZScore(0.9, 1.5, 5)], ids=repr)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_a_device_skips_the_same_in_two_launches(inner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One decides on the step, one learns from it: of ZScore, one that learns says the threshold, too."""
    launches = noted_launches(monkeypatch)
    ours, theirs = (strategies.Skip(copy.deepcopy(inner), factor=1.5) for _ in range(2))
    sequence = norms(22)
    outliers = []
    for norm in sequence:
        found = ours.decide(of_norm(norm))
        with fastclip.use_backend("cpu"):
            expected = theirs.decide(of_norm(norm))
        assert found.outlier is not None
        outliers.append(bool(found.outlier))
        assert outliers[-1] == bool(expected.outlier)
        if math.isfinite(norm):
            torch.testing.assert_close(
                (found.threshold, found.coefs), (expected.threshold, expected.coefs), rtol=1e-12, atol=0
            )
        else:
            assert outliers[-1], "what is not finite is an outlier"
    assert 0 < sum(outliers) < len(sequence)
    assert len(launches) == 2 * len(sequence)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_function_leaves_what_is_not_finite_and_forgets_it(name: str) -> None:
    ours, reference = STRATEGIES[name](), STRATEGIES[name]()
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        values = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
        if step == 7:
            bad = [values[0], values[1].clone()]
            bad[1][2] = math.nan
            params = gradients_of(bad)
            assert math.isnan(float(ours.clip_grad_norm_(params)))
            if name not in ("value", "agc"):  # which clip elements and units, whatever others are
                torch.testing.assert_close(params[0].grad, bad[0], rtol=0, atol=0)
            if isinstance(ours, strategies.Schedule):
                reference.decide(of_norm(1.0))
        one, other = gradients_of(values), gradients_of(values)
        torch.testing.assert_close(
            ours.clip_grad_norm_(one), reference.clip_grad_norm_(other), rtol=0, atol=0
        )
        for p, q in zip(one, other, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_copy_goes_on_with_the_same_bits(name: str, how: str) -> None:
    sequence = norms(80, seed=3)
    original = STRATEGIES[name]()
    for norm in sequence[:40]:
        original.decide(of_norm(norm))
    if how == "state_dict":
        twin = STRATEGIES[name]()
        twin.load_state_dict(pickle.loads(pickle.dumps(original.state_dict())))
    else:
        twin = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
    before = copy.deepcopy(original.state_dict())
    for norm in sequence[40:]:
        twin.decide(of_norm(norm))
    assert repr(original.state_dict()) == repr(before), "the copy changed the original"
    expected = [original.decide(of_norm(norm)).coefs for norm in sequence[40:]]
    twin.load_state_dict(before)
    found = [twin.decide(of_norm(norm)).coefs for norm in sequence[40:]]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=0, equal_nan=True)


def test_the_state_of_another_strategy_is_refused() -> None:
    strategy = strategies.MedianMAD()
    strategy.decide(of_norm(1.0))
    for state, message in (
        (strategies.Percentile().state_dict(), "this is the state of Percentile; expected that of MedianMAD"),
        (used(strategies.MedianMAD(window=30)).state_dict(), r"window has shape \(30,\) and not \(128,\)"),
    ):
        before = repr(strategy.state_dict())
        with pytest.raises(ValueError, match=message):
            strategy.load_state_dict(state)
        assert repr(strategy.state_dict()) == before
    with pytest.raises(ValueError, match="this is the state of MedianMAD; expected that of Skip"):
        strategies.Skip(strategies.MedianMAD()).load_state_dict(strategy.state_dict())
    each = strategies.Ema(per_tensor=True)
    each.clip_grad_norm_(gradients_of([torch.ones(2)] * 3))
    with pytest.raises(ValueError, match="averages of 3 parameters"):
        strategies.Ema().load_state_dict(each.state_dict())


def used(strategy: Strategy) -> Strategy:
    strategy.decide(of_norm(1.0))
    return strategy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: strategies.Fixed(0), "Fixed: max_norm=0; expected a number > 0"),
        (lambda: strategies.Percentile(101), "Percentile: p=101; expected a number from 0 to 100"),
        (lambda: strategies.Percentile(window=3, warmup=4), "warmup <= window"),
        (lambda: strategies.MedianMAD(window=3, warmup=4), "warmup <= window"),
        (lambda: strategies.MedianMAD(window=2.5), "window=2.5; expected at least 2"),
        (lambda: strategies.ZScore(decay=1), "ZScore: decay=1; expected a number between 0 and 1"),
        (lambda: strategies.Ema(ratio=0.5), "Ema: ratio=0.5; expected a number >= 1"),
        (lambda: strategies.QuantileServo(eta=math.nan), "eta=nan"),
        (lambda: strategies.AGC(clipping=-1), "AGC: clipping=-1"),
        (lambda: strategies.Schedule(lambda _: -1.0).decide(of_norm(1.0)), r"max_norm\(0\) is -1.0"),
    ],
)
def test_settings_without_sense_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_skip_wants_a_threshold_for_all() -> None:
    for inner in (strategies.PerTensor(), strategies.MedianMAD, 1.0):
        with pytest.raises(TypeError, match=r"Skip: expected a strategy.*such as MedianMAD\(\)"):
            strategies.Skip(inner)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a function step -> threshold"):
        strategies.Schedule(1.0)  # type: ignore[arg-type]


def test_strategies_for_each_want_the_same_parameters() -> None:
    for name in ("ema_per_tensor", "norm_stabilised", "norm_stabilised_limit"):
        strategy = STRATEGIES[name]()
        strategy.clip_grad_norm_(gradients_of([torch.ones(2)] * 3))
        with pytest.raises(ValueError, match="2 parameters have a gradient, and 3 had one before"):
            strategy.clip_grad_norm_(gradients_of([torch.ones(2)] * 2))


@pytest.mark.parametrize("name", ["ema_per_tensor", "norm_stabilised"])
def test_strategies_for_each_tell_two_parameters_apart_that_take_turns(name: str) -> None:
    experts = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(experts, 0.1), STRATEGIES[name]())
    experts[1].grad = torch.ones(2)
    optimizer.step()
    copy.deepcopy(optimizer).step()
    optimizer.zero_grad()
    experts[0].grad = torch.ones(2)
    with pytest.raises(ValueError, match="parameter 0 has a gradient, and had none before"):
        optimizer.step()


def test_repr_names_the_settings() -> None:
    assert repr(strategies.MedianMAD(3)) == "MedianMAD(k=3.0, window=128, warmup=20, warmup_factor=4.0)"
    assert repr(strategies.Skip(strategies.Fixed(2), 3)) == "Skip(strategy=Fixed(max_norm=2.0), factor=3.0)"


def test_without_gradients_there_is_nothing_to_learn() -> None:
    strategy = strategies.MedianMAD()
    assert float(strategy.clip_grad_norm_([torch.nn.Parameter(torch.ones(2))])) == 0.0
    assert strategy.state_dict() == {"strategy": "MedianMAD"}


def test_all_are_of_the_package() -> None:
    assert {type(make()).__name__ for make in STRATEGIES.values()} == {
        name for name in strategies.__all__ if name not in ("Decision", "Global", "Gradients", "Strategy")
    }
    assert set(OF_EACH) <= set(STRATEGIES)
    assert fastclip.strategies is strategies
