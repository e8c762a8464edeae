"""Properties over generated shapes, dtypes, layouts and values."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import tolerance
import torch
from cases import DTYPES, parameters_of
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import CPU_TARGETS

import fastclip
from fastclip import reference

# Seeded from the test itself, so that every run draws the same examples.
few = settings(max_examples=150, derandomize=True, deadline=None)

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
norm_types = st.sampled_from([1.0, 2.0, math.inf, 0.5, 1.5, 3.0, 7.25, 100.0])
max_norms = st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1e-30, 1e30]))


def on_copies(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Each instruction set, in force, with tensors of these values and layouts at addresses of their own."""
    for target in CPU_TARGETS:
        with target.in_force():
            yield copy.deepcopy(tensors)


@st.composite
def dense(draw: st.DrawFn, finite: bool = True, dtypes: tuple[torch.dtype, ...] = DTYPES) -> torch.Tensor:
    """A tensor that fills its memory, in any order of the dimensions, at any offset, of any magnitude."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
    offset = draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    numel = math.prod(shape)
    largest = min(math.log2(torch.finfo(dtype).max), 1000) - 8
    exponent = draw(st.floats(-largest, largest))
    values = torch.randn(numel + offset, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # elements of all magnitudes in one tensor
        values *= torch.exp2(torch.rand(numel + offset, generator=generator, dtype=torch.float64) * -60)
    memory = (values.clamp(-60, 60) * 2.0**exponent).to(dtype)
    tensor = memory[offset:].reshape(shape)
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if not finite and numel and draw(st.booleans()):
        memory[offset + draw(st.integers(0, numel - 1))] = draw(
            st.sampled_from([math.inf, -math.inf, math.nan])
        )
    return tensor


lists = st.lists(dense(), max_size=6)
any_lists = st.lists(dense(finite=False), max_size=6)


def without_empty(tensors: list[torch.Tensor], norm_type: float) -> list[torch.Tensor]:
    return [t for t in tensors if t.numel()] if norm_type == math.inf else tensors


def norm_bound(tensors: list[torch.Tensor], norm_type: float) -> float:
    numel = sum(t.numel() for t in tensors)
    return max((tolerance.norm(t.dtype, numel, norm_type) for t in tensors), default=0.0)


@few
@given(tensors=any_lists, norm_type=norm_types)
def test_norm_is_the_oracles(tensors: list[torch.Tensor], norm_type: float) -> None:
    tensors = without_empty(tensors, norm_type)
    want, bound = reference.total_norm(tensors, norm_type), norm_bound(tensors, norm_type)
    for ours in on_copies(tensors):
        tolerance.assert_norm(fastclip.get_total_norm(ours, norm_type), want, bound)


@few
@given(tensors=any_lists, norm_type=norm_types, max_norm=max_norms)
def test_clipped_gradients_are_the_oracles(
    tensors: list[torch.Tensor], norm_type: float, max_norm: float
) -> None:
    tensors = without_empty(tensors, norm_type)
    wants, bound = reference.clipped(tensors, max_norm, norm_type), norm_bound(tensors, norm_type)
    for ours in on_copies(tensors):
        fastclip.clip_grad_norm_(parameters_of(ours), max_norm, norm_type)
        for got, before, want in zip(ours, tensors, wants, strict=True):
            tolerance.assert_scaled(got, before, want, tolerance.scaled(got.dtype, bound))


@few
@given(tensors=lists, max_norm=st.floats(1e-3, 1e3))
def test_the_norm_afterwards_is_at_most_max_norm(tensors: list[torch.Tensor], max_norm: float) -> None:
    eps = max((torch.finfo(t.dtype).eps for t in tensors), default=0.0)
    spacing = sum(
        t.numel() * torch.finfo(t.dtype).smallest_normal * torch.finfo(t.dtype).eps for t in tensors
    )
    for ours in on_copies(tensors):
        fastclip.clip_grad_norm_(parameters_of(ours), max_norm)
        assert reference.total_norm(ours) <= max_norm * (1 + eps) + spacing


@few
@given(tensors=any_lists, clip_value=st.floats(0, 1e4))
def test_clamping_gives_the_bits_of_torch(tensors: list[torch.Tensor], clip_value: float) -> None:
    if not tensors:
        return
    wants = copy.deepcopy(tensors)
    torch.nn.utils.clip_grad_value_(parameters_of(wants), clip_value)
    for ours in on_copies(tensors):
        fastclip.clip_grad_value_(parameters_of(ours), clip_value)
        torch.testing.assert_close(ours, wants, rtol=0, atol=0, equal_nan=True)


@few
@given(tensors=lists, norm_type=norm_types)
def test_backends_agree(tensors: list[torch.Tensor], norm_type: float) -> None:
    tensors = without_empty(tensors, norm_type)
    norms = []
    for name in ("cpu", "eager"):
        with fastclip.use_backend(name):
            norms.append(fastclip.get_total_norm(tensors, norm_type))
    want, bound = norms[1].to(torch.float64).item(), 2 * norm_bound(tensors, norm_type)
    tolerance.assert_norm(norms[0], want, bound)


@few
@given(tensors=any_lists)
def test_nonfinite_elements_are_counted(tensors: list[torch.Tensor]) -> None:
    want = {
        str(i): (int(t.isnan().sum()), int(t.isinf().sum()))
        for i, t in enumerate(tensors)
        if not t.isfinite().all()
    }
    for ours in on_copies(tensors):
        assert fastclip.find_nonfinite((str(i), p) for i, p in enumerate(parameters_of(ours))) == want


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
@few
@given(tensors=st.lists(dense(dtypes=(torch.float64,)), max_size=3), norm_type=norm_types)
def test_the_norm_scales_with_the_gradients(scale: float, tensors: Any, norm_type: float) -> None:
    tensors = [t for t in tensors if t.numel() and 1e-250 < t.abs().max() < 1e250]
    for ours in on_copies(tensors):
        norm = fastclip.get_total_norm(ours, norm_type).item()
        scaled = fastclip.get_total_norm([t * scale for t in ours], norm_type).item()
        assert scaled == pytest.approx(norm * scale, rel=2 * norm_bound(ours, norm_type) + 1e-15, abs=0)
