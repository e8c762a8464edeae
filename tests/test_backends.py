"""The table of backends: choice, reasons, refusals, environment variables."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from cases import parameters_of
from programs import run_python

import fastclip
from fastclip import BackendUnavailableError, backends, use_backend
from fastclip.backends import base, cpu, eager


def test_backend_info_lists_every_backend_in_order() -> None:
    info = fastclip.backend_info()
    assert tuple(info) == backends.NAMES
    for name, entry in info.items():
        assert isinstance(entry, fastclip.BackendInfo)
        assert entry.name == name
        assert entry.reason
    assert info["eager"].available
    assert info["eager"].details["torch"] == torch.__version__


def test_cpu_backend_tells_its_instruction_set(instruction_sets: list[str]) -> None:
    details = fastclip.backend_info()["cpu"].details
    assert details["instruction set"] in instruction_sets
    assert details["supported"] == ", ".join(instruction_sets)
    assert details["threads"] == str(torch.get_num_threads())


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_offers_the_whole_interface(name: str) -> None:
    module = backends._load(name)
    offered = [member for member in vars(base.Backend) if not member.startswith("_")]
    assert len(offered) == 12
    assert all(callable(getattr(module, member)) for member in offered)


def test_use_backend_nests_and_restores() -> None:
    assert backends.chosen() == "auto"
    with use_backend("eager"):
        with use_backend("auto"):
            assert backends.chosen() == "auto"
        assert backends.chosen() == "eager"
    with pytest.raises(ZeroDivisionError), use_backend("eager"):
        _ = 1 / 0
    assert backends.chosen() == "auto"


def test_use_backend_concerns_this_thread_alone() -> None:
    seen = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backends.chosen()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_backend_names_the_choices() -> None:
    message = f"use_backend: no backend 'gpu'; expected one of {', '.join(('auto', *backends.NAMES))}"
    with pytest.raises(ValueError, match=message), use_backend("gpu"):
        pass


def test_unavailable_backend_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_reason", "the moon is wrong")
    with (
        pytest.raises(
            BackendUnavailableError, match=r"'cpu' cannot be used: the moon is wrong\. Choose another"
        ),
        use_backend("cpu"),
    ):
        pass


def test_auto_hands_on_what_the_kernels_decline() -> None:
    grad = torch.ones(4)[::2]
    assert fastclip.clip_grad_norm_(parameters_of([grad]), 1.0).item() == pytest.approx(2**0.5)
    assert grad.tolist() == pytest.approx([0.5**0.5] * 2, rel=1e-6)


def test_an_exception_inside_a_backend_is_no_reason_to_try_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("kernel broke")

    monkeypatch.setattr(cpu, "total_norm", broken)
    with pytest.raises(RuntimeError, match="kernel broke"):
        fastclip.get_total_norm([torch.ones(2)])


def test_auto_prefers_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("eager ran")

    monkeypatch.setattr(eager, "total_norm", refuse)
    assert fastclip.get_total_norm([torch.tensor([3.0, 4.0])]) == 5.0
    with use_backend("eager"), pytest.raises(AssertionError, match="eager ran"):
        fastclip.get_total_norm([torch.ones(2)])


PRINT_NORM = "import torch, fastclip; print(fastclip.get_total_norm([torch.arange(70000.) % 7]).item().hex())"


def test_instruction_set_of_the_environment(instruction_sets: list[str]) -> None:
    code = PRINT_NORM + "; print(fastclip.backend_info()['cpu'].details['instruction set'])"
    outputs = [run_python(code, FASTCLIP_INSTRUCTION_SET=name) for name in instruction_sets]
    assert [out.stdout.split()[1] for out in outputs] == instruction_sets
    assert len({out.stdout.split()[0] for out in outputs}) == 1


def test_unknown_instruction_set_of_the_environment(instruction_sets: list[str]) -> None:
    done = run_python("import fastclip; fastclip.backend_info()", FASTCLIP_INSTRUCTION_SET="mmx")
    assert done.returncode != 0
    expected = ", ".join(instruction_sets)
    assert (
        f"FASTCLIP_INSTRUCTION_SET: this machine cannot run 'mmx'; expected one of {expected}." in done.stderr
    )


def test_selecting_an_unknown_instruction_set_changes_nothing(instruction_sets: list[str]) -> None:
    before = cpu._C.instruction_set()
    assert not cpu._C.select_instruction_set("mmx")
    assert cpu._C.instruction_set() == before


def test_backend_of_the_environment() -> None:
    code = """
import torch, fastclip
from fastclip import backends
fastclip.get_total_norm([torch.ones(4)[::2]])
print(backends.chosen())
"""
    assert run_python(code, FASTCLIP_BACKEND="EAGER").stdout.split() == ["eager"]
    refused = run_python(code, FASTCLIP_BACKEND="cpu")
    assert "backend 'cpu' cannot be used: gradient 0 (Tensor) is not dense in memory" in refused.stderr
    unknown = run_python(code, FASTCLIP_BACKEND="gpu")
    choices = ", ".join(("auto", *backends.NAMES))
    assert f"FASTCLIP_BACKEND: no backend 'gpu'; expected one of {choices}." in unknown.stderr
