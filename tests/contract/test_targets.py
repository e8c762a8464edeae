"""The targets of the contract: what cannot run here says why, and where one runs nothing else does."""

from __future__ import annotations

import pytest
import torch
from cases import parameters_of
from targets import TARGETS, Target, marks_of

import fastclip
from fastclip import backends
from fastclip.backends import cpu


@pytest.mark.parametrize("target", [pytest.param(t, id=t.name, marks=marks_of(t)) for t in TARGETS])
def test_no_other_backend_runs(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("another backend ran")

    with target.in_force():
        for name in backends.NAMES:
            if name != target.backend:
                for operation in ("total_norm", "clip_grad_norm_"):
                    monkeypatch.setattr(backends._load(name), operation, refuse)
        assert fastclip.get_total_norm([torch.tensor([3.0, 4.0], device=target.device)]) == 5.0
        (parameter,) = parameters_of([torch.tensor([3.0, 4.0], device=target.device)])
        assert fastclip.clip_grad_norm_(parameter, 10.0) == 5.0
        assert target.instruction_set in (None, cpu._C and cpu._C.instruction_set())
        monkeypatch.setattr(backends._load(target.backend), "total_norm", refuse)
        with pytest.raises(AssertionError, match="another backend ran"):
            fastclip.get_total_norm([torch.ones(2, device=target.device)])
