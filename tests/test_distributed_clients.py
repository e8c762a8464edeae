"""A small model trained in each way of torch's libraries, beside one process that clips by a float64 norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_clients import (
    attached,
    checkpointed,
    fsdp1_without_group,
    monitored,
    piped,
    raised,
    routed_experts,
    scaled,
    train,
    update_bits,
    zero_redundancy,
)
from ranks import ranks

WAYS = [(2, "ddp"), (2, "fsdp2"), (2, "tp"), (2, "tp_sp"), (2, "fsdp1"), (2, "fsdp1_flat")]
WAYS += [(2, "fsdp2_mixed")]
WAYS += [(4, "hsdp"), (4, "fsdp2_tp")]
# Which optimizer steps does not depend on how it is clipped for: both with both in one way.
KINDS = [(*way, *both) for way in WAYS for both in (("sgd", "function"), ("adamw", "wrapper"))]
KINDS += [(2, "fsdp2", "adamw", "function"), (2, "fsdp2", "sgd", "wrapper")]


@pytest.mark.parametrize(("world", "way", "kind", "how"), KINDS)
def test_training_is_that_of_one_process(world: int, way: str, kind: str, how: str) -> None:
    found = ranks(world).run(train, way, kind, how)
    for one in found:
        assert one["losses"] < 2e-5
        assert one["norms"] < 2e-4
        assert one["parameters"] is None or one["parameters"] < 2e-4
        assert one["bits"] == found[0]["bits"]
        assert one["route"] == ("native" if how == "wrapper" else None)


@pytest.mark.parametrize("how", ["function", "wrapper"])
@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B"])
def test_pipeline_stages_clip_by_one_norm(schedule: str, how: str) -> None:
    for far, norms, true in ranks(2).run(piped, schedule, how):
        assert far < 2e-5
        assert norms == pytest.approx(true, rel=1e-4)


def test_zero_redundancy_optimizer() -> None:
    assert max(ranks(2).run(zero_redundancy)) < 2e-4


@pytest.mark.parametrize("world", [2, 4])
def test_experts_of_their_own_on_each_rank(world: int) -> None:
    for norms, true in ranks(world).run(routed_experts, 0):
        assert norms == pytest.approx(true, rel=1e-7)


def test_fused_adamw_over_shards() -> None:
    for one in ranks(2).run(train, "fsdp2", "fused", "wrapper"):
        assert one["parameters"] < 2e-4


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_update_of_shards_has_the_bits_of_the_whole(kind: str) -> None:
    assert ranks(2).run(update_bits, "fsdp2", kind) == [(True, ["native", "native"])] * 2


@pytest.mark.parametrize(("world", "way"), [(2, "fsdp2"), (2, "tp")])
def test_attached_hooks(world: int, way: str) -> None:
    assert max(ranks(world).run(attached, way)) < 2e-4


def test_fsdp1_without_a_group_is_an_error() -> None:
    for said in ranks(2).run(fsdp1_without_group):
        for number, message in enumerate(said):
            assert "is a shard of FullyShardedDataParallel" in message
            remedy = "max_norm=inf and group" if number == 1 else "group=torch.distributed.group.WORLD"
            assert remedy in message


@pytest.mark.parametrize("bad_rank", [None, 0, 1])
def test_a_grad_scaler_sees_what_any_rank_has(bad_rank: int | None) -> None:
    for scale, skips, far in ranks(2).run(scaled, bad_rank):
        assert skips == [False, bad_rank is not None, False]
        assert scale == (16.0 if bad_rank is None else 8.0)
        assert far < 1e-6


@pytest.mark.parametrize("culprit", [0, 1])
def test_every_rank_names_the_culprit(culprit: int) -> None:
    for said in ranks(2).run(raised, culprit):
        assert f"on rank {culprit}, parameter 1 of group 0" in said


@pytest.mark.parametrize("strategy", [None, "zscore", "ema_per_tensor"])
def test_checkpoints_go_onto_another_world_size(strategy: str | None, tmp_path: Path) -> None:
    saved = ranks(2).run(checkpointed, str(tmp_path), True, strategy)[0]
    for world in (2, 4):
        loaded = ranks(world).run(checkpointed, str(tmp_path), False, strategy)[0]
        assert loaded["steps"] == saved["steps"] == 12
        for mine, theirs in zip(loaded["parameters"], saved["parameters"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "tp"])
def test_a_monitor_on_every_rank_records_the_whole(way: str, per_parameter: bool, tmp_path: Path) -> None:
    found = ranks(2).run(monitored, str(tmp_path), way, per_parameter)
    assert [one["written"] for one in found] == [6, None]
    for one in found:
        for ours, theirs in one["norms"]:
            assert ours == pytest.approx(theirs, rel=1e-4)
        for ours, theirs in one["largest"]:
            assert (ours is None) == (theirs is None) == (not per_parameter)
            if per_parameter:
                assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-3)
        told = [pair for pair in one["ratios"] if pair[1] is not None]
        assert len(told) == (2 if per_parameter else 0)
        for ours, theirs in told:
            assert ours == pytest.approx(theirs, rel=1e-3)
