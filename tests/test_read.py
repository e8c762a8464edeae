"""What `fastclip._C` reads of tensors and optimizers for kernels that Python launches, and what it holds."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from cases import DTYPES, dtype_id, parameters_of
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torch.utils.dlpack import DLDeviceType

from fastclip.backends import cpu
from fastclip.kernels import table

_C = cpu._C
CPU = DLDeviceType.kDLCPU
WHOLE: tuple[None, dict[Tensor, Tensor]] = (None, {})
"""No DTensors, and no gradients in the place of `.grad`."""

pytestmark = pytest.mark.skipif(_C is None, reason="needs the C++ extension")


def test_spans_hold_address_numel_and_dtype() -> None:
    tensors = [torch.zeros(6, dtype=dtype) for dtype in table.DTYPES] + [torch.zeros(7)[3:]]
    spans = _C.read_tensors(tensors, False, CPU).spans()
    assert spans[:, 0].tolist() == [t.data_ptr() for t in tensors]
    assert spans[:, 1].tolist() == [6, 6, 6, 6, 4]
    assert spans[:, 2].tolist() == [0, 1, 2, 3, 0]


def test_parameters_without_a_gradient_are_skipped() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), *parameters_of([torch.ones(3), torch.ones(0).double()])]
    found = _C.read_tensors(parameters, True, CPU)
    assert (len(found), found.device, found.has_empty, found.has_float64) == (2, 0, True, True)
    assert all(here is p.grad for here, p in zip(found.tensors, parameters[1:], strict=True))
    assert found.spans()[:, 1].tolist() == [3, 0]
    nothing = _C.read_tensors(parameters[:1], True, CPU)
    assert (len(nothing), nothing.has_empty, nothing.spans().shape) == (0, False, (0, 3))


def test_tensors_elsewhere_are_declined() -> None:
    answers = [
        _C.read_tensors([torch.ones(2)], False, kind) for kind in (DLDeviceType.kDLCUDA, DLDeviceType.kDLROCM)
    ]
    assert answers == [f"gradient 0 (Tensor) is not on a {name} device" for name in ("CUDA", "ROCm")]


def test_gradients_are_held_while_their_addresses_are() -> None:
    parameters = parameters_of([torch.ones(3)])
    grad = weakref.ref(parameters[0].grad)
    found = _C.read_tensors(parameters, True, CPU)
    parameters[0].grad = None
    assert grad() is not None
    del found
    assert grad() is None


def with_grad(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.zeros(8, dtype=dtype))
    param.grad = torch.ones_like(param)
    return param


def adam_state(param: Tensor, dtype: torch.dtype | None = None, counter: Tensor | None = None) -> Any:
    step = torch.zeros(()) if counter is None else counter
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return {"step": step, **{name: torch.zeros_like(param, dtype=dtype) for name in names}}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_of_a_step(dtype: torch.dtype) -> None:
    params = [with_grad(dtype) for _ in range(3)]
    counters = [torch.zeros(()), torch.zeros((), dtype=torch.float64), torch.zeros(())]
    state = {p: adam_state(p, counter=counter) for p, counter in zip(params, counters, strict=True)}
    with_largest = {"params": params[1:], "amsgrad": True}
    groups = [{"params": params[:1]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}, with_largest]
    found = _C.AdamStep.collect(AdamW(groups).param_groups, state, set(params[2:]), False, CPU, *WHOLE)
    assert (len(found), found.has_float64, found.has_empty) == (3, dtype == torch.float64, False)
    assert not found.missing
    rows = found.rows().tolist()
    for i, (param, row) in enumerate(zip(params, rows, strict=True)):
        moments = [t.data_ptr() for t in (state[param]["exp_avg"], state[param]["exp_avg_sq"])]
        largest = state[param]["max_exp_avg_sq"].data_ptr() if i > 0 else 0
        assert row[:6] == [param.grad.data_ptr(), param.data_ptr(), *moments, largest, counters[i].data_ptr()]
        assert row[6:] == [(0, 2, 2)[i], i == 2, i == 1, 8, table.DTYPES.index(dtype)]


def test_rows_of_sgd() -> None:
    with_buffer, without = with_grad(), with_grad()
    state = {with_buffer: {"momentum_buffer": torch.zeros(8)}}
    groups = SGD([{"params": [with_buffer], "momentum": 0.9}, {"params": [without]}]).param_groups
    found = _C.SgdStep.collect(groups, state, set(), False, CPU, *WHOLE)
    buffer = state[with_buffer]["momentum_buffer"].data_ptr()
    assert found.rows()[:, 2:9].tolist() == [[buffer, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]]


def rules_of(optimizer: Adam | SGD) -> Any:
    """The rows of float64 that Triton's kernels take, of parameters without a gradient."""
    kind = _C.SgdStep if type(optimizer) is SGD else _C.AdamStep
    found = kind.collect(optimizer.param_groups, {}, set(), False, CPU, *WHOLE)
    return found if isinstance(found, str) else found.rules().view("float64")


def a_parameter() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(2))]


def test_options_are_read_by_name_whatever_their_order() -> None:
    adam = Adam(a_parameter(), lr=0.1, betas=(0.2, 0.3), eps=0.4, weight_decay=0.5, maximize=True)
    adam.add_param_group({"params": a_parameter(), "decoupled_weight_decay": True, "maximize": False})
    adam.param_groups[1] = dict(reversed(adam.param_groups[1].items()))
    both = [0.5, 0.2, 0.3, 0.4]
    assert rules_of(adam).tolist() == [[0.1, 0, 0, -1, *both, 0], [0.1, 0, 0, 1, *both, 1]]
    sgd = SGD(a_parameter(), lr=0.1, momentum=0.2, weight_decay=0.4, nesterov=True)
    sgd.param_groups[0]["dampening"] = 0.3
    assert rules_of(sgd).tolist() == [[0.1, 0, 0, 1, 0.4, 0.2, 0.3, 1, 0]]


def test_numbers_may_be_tensors_on_the_cpu_and_a_rate_is_left_where_it_is() -> None:
    rate = torch.tensor(0.25, dtype=torch.float64)
    betas = (torch.tensor(0.5), torch.tensor(0.75))
    optimizer = Adam(a_parameter(), lr=rate, betas=betas, weight_decay=1)
    rules = rules_of(optimizer)
    assert rules.tolist()[0][2:] == [1, 1, 1, 0.5, 0.75, 1e-8, 0]
    assert rules.view("int64")[0, 1] == rate.data_ptr()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("lr", torch.tensor(0.1, device="meta"), "the lr of group 1 is on meta"),
        ("lr", torch.tensor(1), "the lr of group 1 is not one float32 or float64"),
        ("eps", torch.tensor(0.1, device="meta"), "the eps of group 1 is on meta"),
        ("betas", (0.9, torch.tensor(0.9, device="meta")), "the betas of group 1 is on meta"),
        ("betas", (0.9,), "the betas of group 1 is not a pair"),
        ("params", (), "the params of group 1 is no list"),
    ],
)
def test_options_that_the_kernels_cannot_take_are_named(name: str, value: Any, reason: str) -> None:
    optimizer = AdamW([{"params": a_parameter()}, {"params": a_parameter()}])
    optimizer.param_groups[1][name] = value
    assert rules_of(optimizer) == reason


@pytest.mark.parametrize("name", ["params", "lr", "betas", "weight_decay", "amsgrad", "maximize"])
def test_an_option_that_is_not_there_is_an_error_as_it_is_in_torch(name: str) -> None:
    optimizer = AdamW(a_parameter())
    del optimizer.param_groups[0][name]
    with pytest.raises(KeyError, match=name):
        rules_of(optimizer)


def test_parameters_without_state_are_named() -> None:
    params = [with_grad(), with_grad()]
    state = {params[0]: adam_state(params[0])}
    found = _C.AdamStep.collect(AdamW(params).param_groups, state, set(), False, CPU, *WHOLE)
    assert [p is params[1] for p in found.missing] == [True]
    assert len(found) == 1
    assert not found.counted_on_cpu


def test_state_wider_than_its_parameter_is_for_the_cuda_library_alone() -> None:
    param = with_grad(torch.bfloat16)
    state = {param: adam_state(param, torch.float32)}
    declined = "parameter 0 of group 0: its exp_avg has another dtype, shape or layout"
    groups = AdamW([param]).param_groups
    assert _C.AdamStep.collect(groups, state, set(), False, CPU, *WHOLE) == declined
    assert len(_C.CudaAdamStep.collect(groups, state, set(), False, CPU, *WHOLE)) == 1


def test_what_the_kernels_write_may_not_be_shared() -> None:
    memory, counter = torch.zeros(16), torch.zeros(())

    def declined(params: list[Tensor], counters: list[Tensor], *, one_grad: bool = False) -> list[str | None]:
        listed = [torch.nn.Parameter(p) for p in params]
        for param in listed:
            param.grad = torch.ones(8)
        if one_grad:
            listed[1].grad = listed[0].grad
        state = {p: adam_state(p, counter=count) for p, count in zip(listed, counters, strict=True)}
        groups = AdamW(listed).param_groups
        answers = [_C.AdamStep.collect(groups, state, set(), write, CPU, *WHOLE) for write in (False, True)]
        return [answer if isinstance(answer, str) else None for answer in answers]

    apart, own = [memory[:8], memory[8:]], [torch.zeros(()), torch.zeros(())]
    assert declined(apart, own) == [None, None]
    assert declined([memory[:8], memory[7:15]], own) == ["two parameters share memory"] * 2
    assert declined(apart, own, one_grad=True) == [None, "two gradients share memory"]
    assert declined(apart, [counter, counter]) == ["two parameters share a step counter"] * 2


def test_a_step_holds_what_it_has_read() -> None:
    param = with_grad()
    state = {param: adam_state(param)}
    held = [weakref.ref(t) for t in (param.grad, state[param]["exp_avg"], state[param]["step"])]
    rate = torch.tensor(0.1)
    held.append(weakref.ref(rate))
    groups = AdamW([param], lr=rate).param_groups
    found = _C.AdamStep.collect(groups, state, set(), False, CPU, *WHOLE)
    groups[0]["lr"] = 0.1
    del rate
    param.grad = None
    state.clear()
    assert all(tensor() is not None for tensor in held)
    del found
    assert all(tensor() is None for tensor in held)


def test_autograd_is_told_of_parameters_and_of_gradients_that_are_written() -> None:
    param = with_grad()
    found = _C.SgdStep.collect(SGD([param]).param_groups, {}, set(), False, CPU, *WHOLE)
    found.increment_versions(with_grads=False)
    assert (param._version, param.grad._version) == (1, 0)
    found.increment_versions(with_grads=True)
    assert (param._version, param.grad._version) == (2, 1)
