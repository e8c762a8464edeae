"""grad_norms and find_nonfinite: what they take beside that which kernels do, and refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastclip
from fastclip import Nonfinite, reference


@pytest.mark.parametrize("norm_type", [0.0, -1.0, -math.inf, math.nan, "-2"])
def test_other_orders_are_refused(norm_type: float) -> None:
    with pytest.raises(ValueError, match=r"grad_norms: norm_type=.*; expected p > 0 or inf"):
        fastclip.grad_norms([], norm_type)


class HasGrad:
    def __init__(self, grad: torch.Tensor) -> None:
        self.grad = grad


LAYOUTS = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(),
    "sparse_csc": lambda t: t.to_sparse_csc(),
    "sparse_bsr": lambda t: t.to_sparse_bsr((2, 1)),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[1, :2]]),
    "jagged": lambda t: torch.nested.nested_tensor([t[0], t[1, :2]], layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t.nan_to_num(1, 1), 0.5, 0, torch.qint8),
    "float8": lambda t: t.to(torch.float8_e5m2),
    "complex": lambda t: t.to(torch.complex64),
    "complex_half": lambda t: t.to(torch.complex32),
    "conjugate": lambda t: torch.complex(t, t.sign()).conj(),
    "sparse_complex": lambda t: t.to(torch.complex64).to_sparse(),
}


@pytest.mark.filterwarnings(
    "ignore:.*prototype stage:UserWarning",
    "ignore:.*quantized tensor creation functions:UserWarning",
    "ignore:ComplexHalf support is experimental:UserWarning",
    "ignore:Sparse:UserWarning",
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_that_no_kernel_takes_are_measured_beside_others(layout: str) -> None:
    dense = torch.tensor([[3.0, 0.0, -1.5, 0.0], [0.0, 2.0, 0.0, 0.0]])
    odd = [HasGrad(torch.tensor([0.6, 0.8])), HasGrad(LAYOUTS[layout](dense))]
    magnitudes = LAYOUTS["conjugate"](dense).abs() if layout == "conjugate" else dense.abs()
    for norm_type in (1.0, 2.0, 3.0, math.inf):
        norms = fastclip.grad_norms(odd, norm_type)
        assert (norms.dtype, norms.device.type) == (torch.float32, "cpu")
        want = [reference.total_norm([part], norm_type) for part in (odd[0].grad, magnitudes)]
        torch.testing.assert_close(norms.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=0)
    assert fastclip.find_nonfinite(enumerate(odd)) == {}
    spoiled = HasGrad(LAYOUTS[layout](torch.tensor([[math.nan, 0.0, 2.0, 0.0], [-math.inf, 1.0, 0.0, 0.0]])))
    if layout != "quantized":  # a quantized number is always finite
        assert fastclip.find_nonfinite([("odd", spoiled)]) == {"odd": Nonfinite(1, 1)}


def test_duplicates_of_a_sparse_gradient_are_added_up() -> None:
    table = torch.nn.Embedding(6, 2, sparse=True)
    table(torch.tensor([1, 1, 2])).sum().backward()
    assert fastclip.grad_norms([table.weight]).tolist() == pytest.approx([10**0.5])
    cancelled = torch.sparse_coo_tensor([[0, 0, 1]], [3e38, 3e38, 1.0], (2,), check_invariants=True)
    assert fastclip.find_nonfinite([("table", HasGrad(cancelled))]) == {"table": Nonfinite(0, 1)}


def test_empty_ones_of_any_layout() -> None:
    empty = [
        torch.empty(0, dtype=torch.complex64),
        torch.nested.nested_tensor([]),
        torch.empty(0).to_sparse(),
    ]
    assert fastclip.grad_norms([HasGrad(grad) for grad in empty]).tolist() == [0.0, 0.0, 0.0]


def test_complex_magnitudes_neither_overflow_nor_round_on_the_way() -> None:
    huge = torch.tensor([3e38 + 3e38j], dtype=torch.complex64)  # of a magnitude beyond float32
    tiny = torch.tensor([1e-44 + 1e-44j, 1e-44], dtype=torch.complex64)
    beyond = torch.tensor([1e308 + 1e308j], dtype=torch.complex128)
    want = [3e38 * 2**0.5, float(tiny[1].real) * 3**0.5, 1e308 * 2**0.5]
    norms = fastclip.grad_norms([HasGrad(grad) for grad in (huge, tiny, beyond)])
    assert norms.dtype == torch.float64
    assert norms.tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_a_gradient_that_is_not_floating_point_is_named(dtype: torch.dtype) -> None:
    things = [HasGrad(torch.ones(2)), HasGrad(torch.ones((3, 1), dtype=dtype))]
    message = rf"^grad_norms: gradient 1 \({dtype}, shape \(3, 1\), cpu\) is not floating point; expected"
    with pytest.raises(TypeError, match=message):
        fastclip.grad_norms(things)  # type: ignore[arg-type]


def two_rows() -> torch.nn.Linear:
    """A layer whose parameters can each be taken apart like a pair."""
    layer = torch.nn.Linear(3, 2)
    layer(torch.full((1, 3), math.nan)).sum().backward()
    return layer


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (lambda m: m.parameters(), "entry 0 is a Parameter"),
        (lambda m: list(m.parameters()), "entry 0 is a Parameter"),
        (lambda m: m.weight, "a Parameter"),
        (lambda m: m, "a Linear"),
        (lambda m: dict(m.named_parameters()), "a dict"),
        (lambda m: ["w1", "w2"], "entry 0 is a str"),
        (lambda m: [("weight", m.weight), m.bias], "entry 1 is a Parameter"),
        (lambda m: [(m.weight, "weight")], r"entry 0 is \(Parameter, str\)"),
        (lambda m: [(m.weight, m.bias)], r"entry 0 is \(Parameter, Parameter\)"),
        (lambda m: [("weight", "bias")], r"entry 0 is \(str, str\)"),
        (lambda m: [("weight", m.weight, 1)], "entry 0 is a tuple"),
    ],
)
def test_what_are_no_pairs_is_never_read_as_pairs(given: Any, what: str) -> None:
    with pytest.raises(TypeError, match=rf"^find_nonfinite: {what}; expected \(name, parameter\) pairs\. "):
        fastclip.find_nonfinite(given(two_rows()))


def test_positions_serve_as_names() -> None:
    found = fastclip.find_nonfinite(enumerate(two_rows().parameters()))  # type: ignore[arg-type]
    assert found == {0: Nonfinite(6, 0)}
