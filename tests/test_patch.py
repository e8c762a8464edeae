"""patch_torch: every name that reaches torch's functions, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from cases import parameters_of
from torch.nn import utils
from torch.nn.utils import clip_grad as torch_module

import fastclip
from fastclip import patch_torch

PUBLIC = ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_")


def names() -> dict[tuple[str, str], object]:
    """What every name of torch that has to do with clipping is bound to."""
    return {
        (module.__name__, name): value
        for module in (utils, torch_module)
        for name, value in vars(module).items()
        if "clip_grad" in name or "total_norm" in name
    }


@pytest.fixture
def originals() -> Iterator[dict[tuple[str, str], object]]:
    before = names()
    yield before
    patch_torch().unpatch()
    assert names() == before


@pytest.fixture
def trainer() -> Iterator[ModuleType]:
    """A module as training libraries write it: a name bound early, under another name, another late."""
    module = ModuleType("trainer_of_the_test")
    code = """
import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils import clip_grad_value_ as clamp
from torch.nn.utils.clip_grad import clip_grad_norm_ as deep
from torch.nn.utils import get_total_norm, clip_grads_with_norm_
def early(*args): return clip_grad_norm_(*args)
def late(*args): return torch.nn.utils.clip_grad_norm_(*args)
def deepest(*args): return torch.nn.utils.clip_grad.clip_grad_norm_(*args)
"""
    exec(code, vars(module))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


# Only fastclip measures this right, so it tells who ran.
def is_fastclip(call: object) -> bool:
    (parameter,) = parameters_of([torch.full((4,), 6e31)])
    return bool(call([parameter], 1.0).isfinite())  # type: ignore[operator]


def test_early_and_late_names_are_reached(originals: object, trainer: ModuleType) -> None:
    calls = ("early", "late", "deepest", "deep", "clip_grad_norm_")
    assert not any(is_fastclip(getattr(trainer, call)) for call in calls)
    with patch_torch():
        assert all(is_fastclip(getattr(trainer, call)) for call in calls)
        assert trainer.clamp is fastclip.clip_grad_value_
        assert trainer.get_total_norm is fastclip.get_total_norm
        assert trainer.clip_grads_with_norm_ is fastclip.clip_grads_with_norm_
    assert not any(is_fastclip(getattr(trainer, call)) for call in calls)


def test_the_four_public_names(originals: dict[tuple[str, str], object]) -> None:
    with patch_torch():
        assert all(getattr(utils, name) is getattr(fastclip, name) for name in PUBLIC)
        assert torch_module.clip_grad_norm_ is fastclip.clip_grad_norm_
        assert torch_module.clip_grad_value_ is fastclip.clip_grad_value_


def test_the_private_helpers_stay(originals: dict[tuple[str, str], object]) -> None:
    with patch_torch():
        for name in ("_get_total_norm", "_clip_grads_with_norm_", "clip_grad_norm"):
            assert getattr(torch_module, name) is originals[torch_module.__name__, name]


def test_exactly_what_was_there_is_restored(
    originals: dict[tuple[str, str], object], trainer: ModuleType
) -> None:
    before = dict(vars(trainer))
    for _ in range(2):
        patch = patch_torch()
        assert names() != originals
        patch.unpatch()
        assert names() == originals
        assert vars(trainer) == before


def test_patching_twice_is_one_patch(originals: dict[tuple[str, str], object]) -> None:
    first = patch_torch()
    assert patch_torch() is first
    first.unpatch()
    assert names() == originals
    first.unpatch()
    assert names() == originals


def test_an_old_patch_does_not_undo_a_new_one(originals: object) -> None:
    old = patch_torch()
    old.unpatch()
    with patch_torch():
        old.unpatch()
        assert utils.clip_grad_norm_ is fastclip.clip_grad_norm_


def test_an_exception_inside_restores(originals: dict[tuple[str, str], object]) -> None:
    with pytest.raises(ZeroDivisionError), patch_torch():
        _ = 1 / 0
    assert names() == originals


def test_without_a_with_statement_it_stays(originals: object) -> None:
    patch_torch()
    assert utils.clip_grad_norm_ is fastclip.clip_grad_norm_


@pytest.mark.parametrize(
    "grad", [torch.ones(2, dtype=torch.complex64), torch.ones(4)[::2]], ids=["complex", "strided"]
)
def test_our_own_routes_still_reach_torch(originals: object, grad: torch.Tensor) -> None:
    """The eager backend calls torch's own functions, which must not come back to fastclip."""
    grad = grad.clone() if grad.is_complex() else torch.ones(4)[::2]
    with patch_torch():
        assert utils.get_total_norm([grad]).item() == pytest.approx(2**0.5)
        assert utils.clip_grad_norm_([HasGrad(grad)], 0.5).item() == pytest.approx(2**0.5)
        utils.clip_grads_with_norm_([HasGrad(grad)], 0.25, torch.tensor(0.5))
        assert utils.get_total_norm([grad]).item() == pytest.approx(0.25, rel=1e-5)
        (parameter,) = parameters_of([torch.tensor([3.0, -4.0])])
        utils.clip_grad_value_([parameter], 1.0, foreach=False)
        assert parameter.grad.tolist() == [1.0, -1.0]


class HasGrad:
    def __init__(self, grad: torch.Tensor) -> None:
        self.grad = grad


def test_the_deprecated_name_goes_through(originals: object) -> None:
    with patch_torch(), pytest.warns(FutureWarning, match="deprecated"):
        assert is_fastclip(utils.clip_grad_norm)


def test_modules_that_cannot_be_searched_are_passed_over(originals: object) -> None:
    """sys.modules may hold None, what is no module, and values that cannot be hashed or compared."""

    class Hostile:
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = None  # type: ignore[assignment]

        def __getattr__(self, name: str) -> object:
            raise AssertionError("touched")

    module = ModuleType("hostile_module_of_the_test")
    module.value = Hostile()  # type: ignore[attr-defined]
    sys.modules.update(
        {module.__name__: module, "hostile_object_of_the_test": Hostile(), "none_of_the_test": None}
    )  # type: ignore[dict-item]
    try:
        with patch_torch():
            assert utils.clip_grad_norm_ is fastclip.clip_grad_norm_
    finally:
        for name in (module.__name__, "hostile_object_of_the_test", "none_of_the_test"):
            del sys.modules[name]


def test_training_with_a_patched_torch(originals: object) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    model(torch.randn(16, 8)).square().sum().backward()
    with patch_torch() as patch:
        assert isinstance(patch, fastclip.TorchPatch)
        before = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)
    assert before > 0.1
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(
        0.1, rel=1e-4
    )
