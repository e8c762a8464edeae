"""The CUDA backend's Python side: when it is there, why it is not, and what it declines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from programs import run_python

import fastclip
from fastclip.backends import Declined, cpu, cuda

needs_extension = pytest.mark.skipif(cpu._C is None, reason="needs the C++ extension")


@pytest.fixture
def anew() -> Iterator[None]:
    """Nothing is remembered from before, nor left behind."""
    cuda.unavailable_reason.cache_clear()
    yield
    cuda.unavailable_reason.cache_clear()


@pytest.mark.usefixtures("anew")
def test_a_torch_without_cuda_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.unavailable_reason() == "this torch is built without CUDA"
    assert cuda.details() == {}


@needs_extension
@pytest.mark.usefixtures("anew")
def test_the_library_of_torchs_cuda_major_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(cuda, "_FOLDER", tmp_path)
    (tmp_path / "libfastclip_cuda13.so").touch()
    assert cuda.unavailable_reason() == (
        "libfastclip_cuda12.so, for torch's CUDA 12.6, is not built (there is: libfastclip_cuda13.so)"
    )


@needs_extension
@pytest.mark.usefixtures("anew")
def test_a_broken_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(cuda, "_FOLDER", tmp_path)
    (tmp_path / "libfastclip_cuda12.so").write_text("no library")
    assert str(tmp_path / "libfastclip_cuda12.so") in str(cuda.unavailable_reason())


@pytest.mark.usefixtures("anew")
def test_without_the_extension_its_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_C", None)
    monkeypatch.setattr(cpu, "_reason", "the extension is elsewhere")
    assert cuda.unavailable_reason() == "the extension is elsewhere"


def test_backend_info_names_the_backend_and_the_reason() -> None:
    info = fastclip.backend_info()["cuda"]
    assert info.available == (cuda.unavailable_reason() is None)
    assert info.reason


@pytest.mark.skipif(cuda.unavailable_reason() is None, reason="needs a machine without a CUDA device")
def test_demanding_it_in_vain_raises_with_the_reason() -> None:
    with pytest.raises(fastclip.BackendUnavailableError, match=r"backend 'cuda' cannot be used: .*CUDA"):
        fastclip.use_backend("cuda").__enter__()


@needs_extension
@pytest.mark.parametrize(
    "call",
    [
        lambda p: cuda.total_norm([p.grad], 2.0),
        lambda p: cuda.clip_grad_norm_([p], 1.0, 2.0, False),
        lambda p: cuda.clip_grads_with_norm_([p], 1.0, torch.tensor(3.0)),
        lambda p: cuda.elementwise_([p], "clamp", 1.0),
        lambda p: cuda.grad_norms([p], 2.0),
        lambda p: cuda.count_nonfinite([p.grad]),
    ],
    ids=["total_norm", "clip_grad_norm_", "clip_grads_with_norm_", "elementwise_", "grad_norms", "count"],
)
def test_gradients_on_the_cpu_are_declined_untouched(call) -> None:  # type: ignore[no-untyped-def]
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 5.0)
    declined = call(parameter)
    assert isinstance(declined, Declined)
    assert "gradient 0" in declined.reason
    assert parameter.grad.tolist() == [5.0, 5.0, 5.0]


def test_asking_for_the_backend_leaves_cuda_uninitialized() -> None:
    """A process that has initialized CUDA cannot fork workers that use it."""
    script = "import fastclip, torch; fastclip.backend_info(); assert not torch.cuda.is_initialized()"
    assert run_python(script).returncode == 0
