"""Foreign objects: whatever is passed in ends in torch's behaviour, never in a crash."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from cases import parameters_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import utils

import fastclip


class WithGrad:
    """Not a Parameter, but something with a gradient."""

    def __init__(self, grad: Any) -> None:
        self.grad = grad


class Foreign:
    """Nothing that torch knows."""

    def __repr__(self) -> str:
        return "Foreign()"


class Tagged(torch.Tensor):
    """A subclass that torch functions keep."""


def tensor() -> torch.Tensor:
    return torch.tensor([3.0, -4.0, 0.0, 12.0])


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
@pytest.mark.parametrize(
    "parameters", [None, 3, "weights", [None], ["weight"], [tensor(), 2], b"w", Foreign()], ids=repr
)
def test_what_is_no_parameter_raises_as_in_torch(name: str, parameters: Any) -> None:
    errors = []
    for module in (fastclip, utils):
        with pytest.raises((TypeError, AttributeError)) as caught:
            getattr(module, name)(parameters, 1.0)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("tensors", [None, [None], ["x"], [1.0], [Foreign()]], ids=repr)
def test_what_is_no_tensor_raises(tensors: Any) -> None:
    for module in (fastclip, utils):
        with pytest.raises((TypeError, AttributeError)):
            module.get_total_norm(tensors)


@pytest.mark.parametrize("total_norm", [None, "1", [2.0]], ids=repr)
def test_what_is_no_norm_raises_as_in_torch(total_norm: Any) -> None:
    types = []
    for module in (fastclip, utils):
        with pytest.raises((TypeError, AttributeError)) as caught:
            module.clip_grads_with_norm_(parameters_of([tensor()]), 1.0, total_norm)
        types.append(caught.type)
    assert types[0] == types[1]


@pytest.mark.parametrize(
    "total_norm",
    [26.0, torch.tensor([26.0]), torch.tensor(26), torch.nn.Parameter(torch.tensor(26.0))],
    ids=repr,
)
def test_norms_of_other_kinds(total_norm: Any) -> None:
    outcomes = []
    for module in (fastclip, utils):
        parameters = parameters_of([tensor()])
        try:
            module.clip_grads_with_norm_(parameters, 13.0, total_norm)
        except Exception as error:
            outcomes.append(type(error))
        else:
            outcomes.append(parameters[0].grad)
    if isinstance(outcomes[1], type):
        assert outcomes[0] is outcomes[1]
    else:
        torch.testing.assert_close(outcomes[0], outcomes[1])


def test_objects_with_a_gradient(backend: str) -> None:
    things = [WithGrad(tensor()), WithGrad(None), *parameters_of([tensor()])]
    assert fastclip.clip_grad_norm_(things, 1.0).item() == pytest.approx(13 * 2**0.5)
    assert things[0].grad.norm().item() == pytest.approx(0.5**0.5, rel=1e-6)


def test_a_gradient_that_raises(backend: str) -> None:
    class Raises:
        @property
        def grad(self) -> torch.Tensor:
            raise LookupError("no gradient today")

    good = WithGrad(tensor())
    for call in (fastclip.clip_grad_norm_, fastclip.clip_grad_value_, utils.clip_grad_norm_):
        with pytest.raises(LookupError, match="no gradient today"):
            call([good, Raises()], 1.0)
    assert good.grad.tolist() == tensor().tolist()


def test_a_gradient_that_shrinks_the_list() -> None:
    class Shrinks:
        def __init__(self, parameters: list[Any]) -> None:
            self.parameters = parameters

        @property
        def grad(self) -> torch.Tensor:
            del self.parameters[1:]
            return torch.ones(4)

    parameters: list[Any] = []
    parameters.extend([Shrinks(parameters), *(WithGrad(tensor()) for _ in range(5))])
    assert fastclip.clip_grad_norm_(parameters, 100.0) > 0


@pytest.mark.parametrize("grad", [3, "g", [1.0], object()], ids=lambda grad: type(grad).__name__)
def test_gradients_that_are_no_tensors_raise(grad: Any) -> None:
    for module in (fastclip, utils):
        with pytest.raises((TypeError, AttributeError)):
            module.clip_grad_norm_([WithGrad(grad)], 1.0)


def test_a_named_backend_says_what_it_cannot_take() -> None:
    with (
        fastclip.use_backend("cpu"),
        pytest.raises(
            fastclip.BackendUnavailableError, match=r"gradient 1 \(.*Tagged\) is not a plain torch.Tensor"
        ),
    ):
        fastclip.get_total_norm([tensor(), tensor().as_subclass(Tagged)])


def both(make: Callable[[], Any], max_norm: float = 1.0, call: str = "clip_grad_norm_") -> list[Any]:
    """What fastclip and torch make of the same gradient: (result or exception type, gradient)."""
    outcomes = []
    for module in (fastclip, utils):
        thing = WithGrad(make())
        try:
            result = getattr(module, call)([WithGrad(tensor()), thing], max_norm)
        except Exception as error:
            result = type(error)
        outcomes.append((result, thing.grad))
    return outcomes


def test_subclass() -> None:
    (norm, grad), (torch_norm, torch_grad) = both(lambda: tensor().as_subclass(Tagged))
    assert type(norm) is type(torch_norm)
    assert type(grad) is Tagged
    torch.testing.assert_close(norm, torch_norm)
    torch.testing.assert_close(grad, torch_grad)


def test_buffers_and_parameters_as_gradients() -> None:
    (norm, grad), (torch_norm, torch_grad) = both(lambda: torch.nn.Parameter(tensor()))
    torch.testing.assert_close((norm, grad), (torch_norm, torch_grad))


@pytest.mark.filterwarnings(
    "ignore:.*prototype stage:UserWarning",
    "ignore:.*quantized tensor creation functions:UserWarning",
    "ignore:ComplexHalf support is experimental:UserWarning",
    "ignore:Sparse:UserWarning",
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: tensor().to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.quantize_per_tensor(tensor(), 0.1, 0, torch.qint8),
        lambda: tensor().to_mkldnn(),
        lambda: torch.ones(4).to(torch.float8_e4m3fn),
        lambda: torch.ones(4, dtype=torch.int32),
        lambda: torch.ones(4, dtype=torch.complex32),
    ],
    ids=[
        "sparse_coo",
        "sparse_csr",
        "nested",
        "jagged",
        "quantized",
        "mkldnn",
        "float8",
        "integer",
        "complex32",
    ],
)
@pytest.mark.parametrize("call", ["clip_grad_norm_", "clip_grad_value_"])
def test_other_layouts_and_dtypes_end_as_in_torch(make: Callable[[], Any], call: str) -> None:
    (result, grad), (torch_result, torch_grad) = both(make, call=call)
    if isinstance(torch_result, type):
        assert result is torch_result
    elif torch_result is not None:
        torch.testing.assert_close(result, torch_result)
    assert type(grad) is type(torch_grad)
    assert grad.layout == torch_grad.layout


@pytest.mark.parametrize("call", ["clip_grad_norm_", "clip_grad_value_"])
def test_meta(call: str) -> None:
    for module in (fastclip, utils):
        parameters = parameters_of([torch.ones(4, device="meta"), torch.ones(2, 3, device="meta")])
        result = getattr(module, call)(parameters, 1.0)
        assert result is None or (result.device.type, result.shape) == ("meta", ())


def test_fake_tensors_inside_and_outside_their_mode() -> None:
    with FakeTensorMode() as mode:
        parameters = parameters_of([torch.ones(4), torch.ones(2, 3)])
        inside = fastclip.clip_grad_norm_(parameters, 1.0)
        fastclip.clip_grad_value_(parameters, 1.0)
    outside = fastclip.clip_grad_norm_(parameters, 1.0)
    for norm in (inside, outside):
        assert norm.fake_mode is mode
        assert (norm.shape, norm.dtype) == ((), torch.float32)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_dtensor(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    for placement in (Shard(0), Replicate()):
        outcomes = []
        for module in (fastclip, utils):
            parameter = torch.nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [placement]))
            parameter.grad = distribute_tensor(tensor(), mesh, [placement])
            norm = module.clip_grad_norm_([parameter], 1.0)
            module.clip_grad_value_([parameter], 0.5)
            assert isinstance(norm, DTensor)
            outcomes.append((norm.full_tensor(), parameter.grad.full_tensor()))
        torch.testing.assert_close(outcomes[0], outcomes[1])


def negated() -> torch.Tensor:
    """-2, 3, -0.25, 0.25, while memory holds the opposite values."""
    return torch._neg_view(torch.tensor([2.0, -3.0, 0.25, -0.25]))


@pytest.mark.parametrize(
    "make", [negated, lambda: torch.tensor([2j, -3j, 0.25j]).conj().imag], ids=["dense", "strided"]
)
def test_lazily_negated_views(make: Callable[[], torch.Tensor]) -> None:
    """Harmless to a norm, not to a clamp, which torch's foreach operations refuse."""
    want = make().resolve_neg().clamp(-0.5, 0.5).tolist()
    grad = make()
    fastclip.clip_grad_value_([WithGrad(grad)], 0.5, foreach=False)
    assert grad.resolve_neg().tolist() == want
    grad = make()
    for module in (fastclip, utils):
        with pytest.raises(RuntimeError, match="negation"):
            module.clip_grad_value_([WithGrad(grad)], 0.5)
    assert grad.resolve_neg().tolist() == make().resolve_neg().tolist()


@pytest.mark.parametrize("numel", [1, 4])
def test_a_clamp_sees_in_every_call_whether_a_view_is_negated(numel: int) -> None:
    param = torch.nn.Parameter(torch.zeros(numel))
    for call in range(12):
        param.grad = None
        param.grad = torch.full((numel,), 2.0)
        if call % 3 == 2:
            param.grad = torch._neg_view(param.grad)
            with pytest.raises(RuntimeError, match="negation"):
                fastclip.clip_grad_value_([param], 0.5)
        else:
            fastclip.clip_grad_value_([param], 0.5)
            assert param.grad.tolist() == [0.5] * numel


def test_norm_clipping_of_a_lazily_negated_view() -> None:
    grad = negated()
    norm = fastclip.clip_grad_norm_([WithGrad(grad)], 1.0)
    assert norm.item() == pytest.approx(13.125**0.5)
    torch.testing.assert_close(grad.resolve_neg(), negated().resolve_neg() / norm)


def test_inference_tensors() -> None:
    for call in ("clip_grad_norm_", "clip_grad_value_"):
        grads = []
        for module in (fastclip, utils):
            with torch.inference_mode():
                grad = tensor()
                getattr(module, call)([WithGrad(grad)], 0.5)
                grads.append(grad.tolist())
        assert grads[0] == pytest.approx(grads[1], rel=1e-6)


def test_inference_tensors_outside_inference_mode(native: object) -> None:
    with torch.inference_mode():
        grad = tensor()
    fastclip.clip_grad_norm_([WithGrad(grad)], 0.5)
    assert grad.clone().norm().item() == pytest.approx(0.5, rel=1e-6)


def total(x: torch.Tensor) -> torch.Tensor:
    return fastclip.get_total_norm([x, 2 * x])


def test_vmap() -> None:
    batch = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for module in (fastclip, utils):
        got = torch.func.vmap(lambda x: module.get_total_norm([x, 2 * x], foreach=False))(batch)  # noqa: B023
        torch.testing.assert_close(got, batch.norm(dim=1) * 5**0.5)
        with pytest.raises(RuntimeError, match="_foreach_norm"):
            torch.func.vmap(lambda x: module.get_total_norm([x, 2 * x]))(batch)  # noqa: B023


def test_functional_grad() -> None:
    """torch measures under no_grad: there the norm is a constant."""

    def product(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.get_total_norm([x, 2 * x]) * x.sum()

    got = torch.func.grad(lambda x: product(fastclip, x))(tensor())
    torch.testing.assert_close(got, torch.func.grad(lambda x: product(utils, x))(tensor()))


def test_make_fx_records_the_operations() -> None:
    graph = make_fx(total)(tensor())
    assert any("norm" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(2 * tensor()), total(2 * tensor()))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_traces_one_graph(compiler: str, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    compiled_total = torch.compile(total, backend=compiler, fullgraph=True)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(compiled_total(tensor()), total(tensor()))
        parameters = parameters_of([tensor(), tensor().bfloat16()])
        expected = parameters_of([tensor(), tensor().bfloat16()])

        def clip(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
            norm = fastclip.clip_grad_norm_(parameters, 1.0)
            fastclip.clip_grads_with_norm_(parameters, 0.5, norm)
            fastclip.clip_grad_value_(parameters, 0.3)
            return norm

        got = torch.compile(clip, backend=compiler, fullgraph=True)(parameters)
        torch.testing.assert_close(got, clip(expected))
        torch.testing.assert_close([p.grad for p in parameters], [p.grad for p in expected])
    assert not caplog.records
    explained = torch._dynamo.explain(total)(tensor())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch._dynamo.reset()


def test_compile_traces_a_negative_threshold() -> None:
    torch._dynamo.reset()
    parameters = parameters_of([tensor()])
    torch.compile(lambda: fastclip.clip_grad_norm_(parameters, -1.0), backend="eager", fullgraph=True)()
    torch.testing.assert_close(parameters[0].grad, -tensor() / tensor().norm())
    torch._dynamo.reset()


def test_compile_honours_the_chosen_backend_of_eager() -> None:
    torch._dynamo.reset()
    with fastclip.use_backend("eager"):
        got = torch.compile(total, backend="eager", fullgraph=True)(tensor())
    assert got.item() == pytest.approx(13 * math.sqrt(5), rel=1e-6)
    torch._dynamo.reset()


def test_autocast_and_default_dtype_leave_the_norm_alone(backend: str) -> None:
    want = fastclip.get_total_norm([tensor()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastclip.get_total_norm([tensor()]).equal(want)
    torch.set_default_dtype(torch.float64)
    try:
        assert (
            fastclip.get_total_norm([torch.tensor([5.0, 12.0], dtype=torch.float32)]).dtype == torch.float32
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device_leaves_the_norm_alone(backend: str) -> None:
    with torch.device("meta"):
        norm = fastclip.get_total_norm([torch.tensor([5.0, 12.0], device="cpu")])
    assert norm.item() == 13.0
