"""The Triton backend under the interpreter: many tensors, and what it says of itself."""

from __future__ import annotations

import pytest
import tolerance
import torch
from cases import BY_NAME
from triton_interpreter import interpreted, needs_triton

import fastclip
from fastclip import reference
from fastclip.backends import Declined, cpu
from fastclip.backends import triton as backend

__all__ = ["interpreted"]


pytestmark = [
    needs_triton,
    pytest.mark.usefixtures("interpreted"),
]


def test_many_tiny_tensors() -> None:
    tensors = BY_NAME["1200_tiny"].tensors("cpu", torch.bfloat16)[:300]
    norm = fastclip.get_total_norm(tensors)
    tolerance.assert_norm(
        norm,
        reference.total_norm(tensors),
        tolerance.norm(torch.bfloat16, sum(t.numel() for t in tensors), 2.0, "cuda"),
    )


def test_backend_info_says_that_it_is_interpreted() -> None:
    info = fastclip.backend_info()["triton"]
    assert info.available
    assert "interpreted" in info.details["devices"]


def test_without_the_extension_its_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_reason", "the extension is elsewhere")
    assert backend.unavailable_reason() == "the extension is elsewhere"
    assert backend.details() == {}


@pytest.mark.parametrize(("hip", "expected"), [("6.4", "is not on a ROCm device"), (None, "a CUDA device")])
def test_tensors_are_looked_for_on_the_devices_of_torch(
    hip: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.version, "hip", hip)
    declined = backend.total_norm([torch.ones(3)], 2.0)
    assert isinstance(declined, Declined)
    assert expected in declined.reason
