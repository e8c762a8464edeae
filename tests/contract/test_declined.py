"""What kernels cannot take: declined with the reason, before anything is read or written."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import parameters_of
from targets import NATIVE, Target, on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastclip


class Tagged(Tensor):
    """A subclass that torch functions keep."""


TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "complex": (lambda t: t.to(torch.complex64), "is not float16, bfloat16"),
    "integer": (lambda t: t.int(), "is not float16, bfloat16"),
    "sparse": (lambda t: t.to_sparse(), "has no plain memory"),
    "every_second": (lambda t: t[::2], "is not dense in memory"),
    "expanded": (lambda t: t[:1].expand(4), "is not dense in memory"),
    "meta": (lambda t: t.to("meta"), "has no plain memory|is not on "),
    "subclass": (lambda t: t.as_subclass(Tagged), r"Tagged\) is not a plain torch.Tensor"),
    "fake": (
        lambda t: FakeTensorMode().from_tensor(t),
        r"FakeTensor\) is not a plain torch.Tensor",
    ),
}


@on("name", lambda _: ((name,) for name in TENSORS), NATIVE)
def test_a_tensor_is_declined_untouched(target: Target, name: str) -> None:
    build, reason = TENSORS[name]
    memory = torch.full((4,), 5.0, device=target.device)
    given = [torch.ones(2, device=target.device), build(memory)]
    parameters = [HasGrad(tensor) for tensor in given]
    for call in (
        lambda: fastclip.get_total_norm(given),
        lambda: fastclip.grad_norms(parameters),
        lambda: fastclip.clip_grad_norm_(parameters, 0.1),
        lambda: fastclip.clip_grads_with_norm_(parameters, 0.1, torch.tensor(7.0, device=target.device)),
        lambda: fastclip.clip_grad_value_(parameters, 0.1),
    ):
        with pytest.raises(fastclip.BackendUnavailableError, match=rf"gradient 1 .*({reason})"):
            call()
    assert (given[0].tolist(), given[0]._version) == ([1.0, 1.0], 0)
    assert (memory.tolist(), memory._version) == ([5.0] * 4, 0)


class HasGrad:
    def __init__(self, grad: Tensor) -> None:
        self.grad = grad


@on("norm_type", lambda _: ((p,) for p in (0.0, -1.0, -math.inf, math.nan)), NATIVE)
def test_an_order_without_a_kernel_is_declined_untouched(target: Target, norm_type: float) -> None:
    grad = torch.full((3,), 5.0, device=target.device)
    for call in (
        lambda: fastclip.get_total_norm([grad], norm_type),
        lambda: fastclip.clip_grad_norm_(parameters_of([grad]), 1.0, norm_type),
    ):
        with pytest.raises(fastclip.BackendUnavailableError, match="no kernel for norm_type="):
            call()
    assert (grad.tolist(), grad._version) == ([5.0] * 3, 0)


@on("", targets=NATIVE)
def test_an_empty_gradient_has_no_inf_norm(target: Target) -> None:
    grads = [torch.full((3,), 5.0, device=target.device), torch.empty(0, device=target.device)]
    for call in (
        lambda: fastclip.get_total_norm(grads, math.inf),
        lambda: fastclip.clip_grad_norm_(parameters_of(grads), 0.1, math.inf),
    ):
        with pytest.raises(fastclip.BackendUnavailableError, match="a gradient is empty"):
            call()
    assert grads[0].tolist() == [5.0] * 3


@on("", targets=NATIVE)
def test_what_functorch_wraps_is_declined(target: Target) -> None:
    with pytest.raises(fastclip.BackendUnavailableError, match="has no plain memory"):
        torch.func.vmap(lambda x: fastclip.get_total_norm([x]))(torch.ones(3, 4, device=target.device))
