"""The functions over DTensors, stages and experts, on two to four processes, beside a float64 oracle."""

from __future__ import annotations

import math
import tempfile

import pytest
import torch
from distributed_cases import (
    ON_FOUR,
    ON_TWO,
    constants_made,
    counted_zero,
    measure,
    nonfinite_everywhere,
    norms_of_each,
    only_measured,
    patched,
    poisoned,
    refusals,
    same_bits,
    values_clipped,
    version_rises,
    without_gradients,
)
from programs import run_python
from ranks import ranks

import fastclip
from fastclip.distributed import shards
from fastclip.distributed.payload import Encoding

LAYOUTS = [(2, name) for name in ON_TWO] + [(4, name) for name in ON_FOUR] + [(3, "shard"), (3, "mixed")]
ALIKE = [
    (w, name) for w, name in LAYOUTS if not any(part in name for part in ("stage", "expert", "pipeline"))
]
# What p and the dtype change does not depend on the other.
ORDERS = [(p, torch.float32) for p in (1.0, 2.0, 3.0, math.inf, 0.5, 7.0)]
ORDERS += [(p, torch.bfloat16) for p in (1.0, 2.0, 3.0, math.inf)] + [(2.0, torch.float64)]


def id_of(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("p", "dtype"), ORDERS, ids=id_of)
@pytest.mark.parametrize(("world", "name"), LAYOUTS, ids=id_of)
def test_norm_and_clip(world: int, name: str, p: float, dtype: torch.dtype) -> None:
    # bfloat16 terms of a sum are themselves rounded by the ranks that add them.
    exact = 1e-7 if not (name.startswith("partial") and dtype is torch.bfloat16) else 4e-3
    after = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float64: 2e-6}[dtype]
    found = ranks(world).run(measure, name, p, dtype)
    for one in found:
        for key in ("norm", "idle"):
            # Of a large p, the root of a sum is rounded to float32 as every norm is.
            assert one[key] == pytest.approx(one["true"], rel=exact), key
        assert one["after"] == pytest.approx(1, abs=after)
        assert one["alone"] == one["after"]
        assert one["kept"]
        twice = 2 if 4 < p < math.inf else 1
        pending = name.startswith("partial")
        assert one["collectives"] == (one["expected"] - pending) * twice + pending
        assert one["largest"] <= 64
    # A stage without parameters does not know that those of others are float64.
    assert len({torch.tensor(one["norm"]).float().item() for one in found}) == 1


@pytest.mark.parametrize("scale", [6e31, 1e-30, 1e-42], ids=id_of)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0], ids=id_of)
def test_powers_beyond_float32(p: float, scale: float) -> None:
    for norm, true, collectives in ranks(2).run(only_measured, "shard", p, scale):
        assert norm == pytest.approx(true, rel=1e-7, abs=1.5e-45)
        assert collectives == 1


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-300], ids=id_of)
@pytest.mark.parametrize("p", [2.0, 3.0, 4.0, 9.0], ids=id_of)
def test_powers_beyond_float64(p: float, scale: float) -> None:
    whole = torch.tensor([3.0, 4.0], dtype=torch.float64) * scale
    encoding = Encoding.of(p if p <= 4 else math.inf)
    payload = encoding.encode(whole, torch.ones(2, dtype=torch.float64), None)
    if p <= 4:
        assert float(encoding.decode(payload)) == pytest.approx((3**p + 4**p) ** (1 / p) * scale, rel=1e-14)
        assert payload.numel() * 8 <= 64
    else:
        assert float(encoding.decode(payload)) == 4 * scale


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, 4.0], ids=id_of)
def test_host_and_device_write_the_same(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = torch.tensor([0.0, 3.0, 1e-250, 4e200, 5e-324, 1e308, 7e3], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.25, 1.0, 1e-3, 1.0, 1e-6, 0.5], dtype=torch.float64)
    encoding = Encoding.of(p)
    on_host = encoding.encode(norms, weights, torch.tensor(True))
    norm = encoding.decode(on_host)
    with monkeypatch.context() as patch:
        patch.setattr(Encoding, "_on_host", staticmethod(lambda tensor: False))
        on_device = encoding.encode(norms, weights, torch.tensor(True))
        torch.testing.assert_close(on_device, on_host, rtol=1e-14, atol=0.0)
        torch.testing.assert_close(encoding.decode(on_device), norm, rtol=1e-14, atol=0.0)


def test_parts_of_very_different_size_add_up() -> None:
    encoding = Encoding.of(2.0)
    sizes = torch.tensor([1e-200, 1e-160, 3e-140, 4e-140], dtype=torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    payloads = [encoding.encode(size.reshape(1), ones, None) for size in sizes]
    assert float(encoding.decode(encoding.merge(payloads))) == pytest.approx(5e-140, rel=1e-15)


@pytest.mark.parametrize(
    ("world", "name"), [(2, "shard"), (3, "mixed"), (4, "hsdp"), (4, "experts")], ids=id_of
)
def test_all_ranks_have_the_same_bits(world: int, name: str) -> None:
    first, *others = ranks(world).run(same_bits, name, 200)
    assert all(other == first for other in others)
    assert first[:10] == ranks(world).run(same_bits, name, 10)[0]


def test_the_norm_does_not_depend_on_the_layout() -> None:
    found = [ranks(world).run(same_bits, name, 10)[0] for world, name in LAYOUTS if "partial" not in name]
    for trial in zip(*found, strict=True):
        norms = torch.frombuffer(bytearray(b"".join(trial)), dtype=torch.float64).float()
        assert float((norms.max() - norms.min()) / norms.min()) <= 2**-23


@pytest.mark.parametrize(
    ("world", "name"), [(2, "shard"), (2, "stages"), (4, "two_dims"), (4, "experts")], ids=id_of
)
def test_a_rank_without_gradients_hangs_nobody(world: int, name: str) -> None:
    for norm, true in ranks(world).run(without_gradients, name):
        assert norm == pytest.approx(true, rel=1e-7)


@pytest.mark.parametrize("p", [2.0, math.inf], ids=id_of)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=id_of)
@pytest.mark.parametrize(
    ("world", "name"),
    [(2, "shard"), (2, "mixed"), (2, "stages"), (2, "local_experts"), (2, "replicate")]
    + [(4, name) for name in ON_FOUR if "partial" not in name],
    ids=id_of,
)
def test_what_one_rank_finds_holds_for_all(world: int, name: str, bad: float, p: float) -> None:
    culprit = 1
    found = ranks(world).run(poisoned, name, bad, culprit, p)
    for rank, one in enumerate(found):
        assert one["skipped"]
        assert one["still"]
        assert one["state"] == 0
        assert one["kept"]
        assert "non-finite" in one["said"]
        assert f"rank {culprit}, position 0" in one["said"], one["said"]
        # Without the flag a function reduces over shards alone, as torch does: another copy is not looked at.
        if (name == "replicate" and rank != culprit) or (name == "hsdp" and rank // 2 != culprit // 2):
            assert math.isfinite(one["norm"])
            continue
        assert math.isnan(one["norm"]) if math.isnan(bad) else one["norm"] == math.inf


@pytest.mark.parametrize(("world", "name"), ALIKE, ids=id_of)
def test_values_are_clamped(world: int, name: str) -> None:
    assert all(ranks(world).run(values_clipped, name))


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf], ids=id_of)
@pytest.mark.parametrize(
    ("world", "name"),
    [(2, "shard"), (2, "mixed"), (2, "partial_sum"), (4, "hsdp"), (4, "two_dims_part"), (4, "two_dims_mesh")],
    ids=id_of,
)
def test_norms_of_each(world: int, name: str, p: float) -> None:
    for norms, true in ranks(world).run(norms_of_each, name, p):
        assert norms == pytest.approx(true, rel=2e-7)


def test_find_nonfinite_here_and_everywhere() -> None:
    (here, everywhere), (there, same) = ranks(2).run(nonfinite_everywhere)
    assert everywhere == same == {"layer0": (2, 0), "layer2": (0, 1)}
    assert here == {"layer2": (0, 1)}
    assert there == {"layer0": (2, 0), "layer2": (0, 1)}


def test_versions_rise_with_what_is_written() -> None:
    assert ranks(2).run(version_rises) == [(True, True)] * 2


def test_a_tied_weight_is_counted_once() -> None:
    for norm, true in ranks(2).run(counted_zero):
        assert norm == pytest.approx(true, rel=1e-7)


def test_patch_torch_takes_a_group() -> None:
    for norm, true in ranks(2).run(patched):
        assert norm == pytest.approx(true, rel=1e-7)


def test_calls_that_make_no_sense_are_refused() -> None:
    doubled, kind, mesh, order = ranks(2).run(refusals)[0]
    assert "ranks [0, 1] of group hold shards of the same DTensors" in doubled
    assert kind.startswith("TypeError: clip_grad_norm_: group is a int")
    assert mesh.startswith("TypeError: clip_grad_norm_: mesh is a ProcessGroup")
    assert order.startswith("ValueError: clip_grad_norm_: norm_type=-1.0 over several ranks")


def test_marks_of_other_parameters_do_not_matter() -> None:
    marked, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    fastclip.distributed.count_zero(marked)
    assert shards("clip_grad_norm_", [other], of_gradients=True) is None
    assert shards("clip_grad_norm_", [other, marked], of_gradients=True) is not None
    marked.grad, other.grad = torch.full((2,), 3.0), torch.tensor([0.0, 4.0])
    assert float(fastclip.clip_grad_norm_([marked, other], 1.0)) == 4.0
    assert marked.grad.tolist() == pytest.approx([0.75, 0.75], rel=1e-6)


def test_plans_do_not_outlive_their_process_group() -> None:
    code = """
import sys, torch, torch.distributed as dist, fastclip
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
plans = []
for turn in range(2):
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/{turn}", rank=0, world_size=1)
    grad = distribute_tensor(torch.tensor([3.0, 4.0]), init_device_mesh("cpu", (1,)), [Shard(0)])
    print("found", fastclip.get_total_norm([grad], mesh=grad.device_mesh).to_local().item())
    plans += [fastclip.distributed.shards("test", [grad], of_gradients=False).plan for _ in range(2)]
    dist.destroy_process_group()
print("found", plans[0] is plans[1], plans[1] is plans[2])
"""
    with tempfile.TemporaryDirectory() as folder:
        run = run_python(code, folder)
    # Among what gloo says of connections in torch 2.10.
    found = [line for line in run.stdout.splitlines() if line.startswith("found ")]
    assert found == ["found 5.0", "found 5.0", "found True False"], run.stderr


def test_patch_torch_refuses_another_group_meanwhile() -> None:
    with fastclip.patch_torch(), pytest.raises(RuntimeError, match="another group or mesh"):
        fastclip.patch_torch(group=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["shard", "mixed"])
def test_a_second_clip_copies_no_number_from_the_host(name: str) -> None:
    assert ranks(2).run(constants_made, name) == [0, 0]
