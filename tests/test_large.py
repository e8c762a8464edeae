"""More elements than 32 bits count. Needs 5 GB of memory; run with -m large."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import tolerance
import torch
from cases import parameters_of

import fastclip

NUMEL = 2**31 + 7

pytestmark = [pytest.mark.large, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def grad() -> Iterator[torch.Tensor]:
    """Ones, and threes in the last 7 places, which 32-bit indices do not reach."""
    values = torch.ones(NUMEL, dtype=torch.bfloat16)
    values[-7:] = 3.0
    yield values
    del values


def test_every_element_is_read_and_written(grad: torch.Tensor, threads: Callable[[int], None]) -> None:
    (parameter,) = parameters_of([grad])
    expected = math.sqrt(2**31 + 7 * 9)
    bound = tolerance.norm(grad.dtype, 0, 2.0)  # whole numbers are added: those sums do not round
    with fastclip.use_backend("cpu"):
        norms = set()
        for count in (1, 2):
            threads(count)
            norm = fastclip.clip_grad_norm_([parameter], math.inf)
            norms.add(norm.item())
            tolerance.assert_norm(norm, expected, bound)
        assert len(norms) == 1
        assert fastclip.get_total_norm([grad], math.inf) == 3.0
        assert fastclip.get_total_norm([grad], 1.0).item() == pytest.approx(2**31 + 21, rel=1e-7)
        fastclip.clip_grad_norm_([parameter], (expected + 1e-6) / 2)  # halves
    assert grad[-9:].tolist() == [0.5] * 2 + [1.5] * 7
    assert grad[2**30 : 2**31 : 2**28].tolist() == [0.5] * 4
    with fastclip.use_backend("cpu"):
        fastclip.clip_grad_value_([parameter], 0.75)
    assert grad[-9:].tolist() == [0.5] * 2 + [0.75] * 7
    grad[-1] = math.nan
    grad[0] = math.inf
    assert fastclip.find_nonfinite([("w", parameter)]) == {"w": fastclip.Nonfinite(nan=1, inf=1)}
