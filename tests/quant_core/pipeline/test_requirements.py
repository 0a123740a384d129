"""A job that does not fit its machine is refused before it begins, with what would fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.errors import ResourceError
from bitmill.pipeline.estimate import (
    Machine,
    estimate,
    fixed_host_bytes,
    packed_bytes,
    stream_bytes,
)
from bitmill.pipeline.job import run_job
from bitmill.pipeline.requirements import Room, check_room, smaller_jobs
from plans import llama_plan
from tiny import tiny_llama

GB = 10**9
PLAN = llama_plan(blocks=32, hidden=4096, inner=11008, kv=4096)
AMPLE = Room(accelerator=80 * GB, host=64 * GB, disk=500 * GB)


def spec(**changes: Any) -> QuantizationConfig:
    base = {"budget": {"code_bits": 3}}
    return parse_config(base | changes)


def refusal(asked: QuantizationConfig, room: Room, **options: bool) -> ResourceError:
    with pytest.raises(ResourceError) as caught:
        check_room(PLAN, asked, room, **options)
    assert caught.value.code == "does_not_fit"
    return caught.value


def test_a_job_starts_where_it_just_fits() -> None:
    check_room(PLAN, spec(), AMPLE)
    check_room(PLAN, spec(), replace(AMPLE, accelerator=None, output=4 * GB))
    machine = Machine(accelerator=True)
    needed = estimate(PLAN, spec(), machine)
    streams = stream_bytes(PLAN, spec(), machine)
    just = Room(
        accelerator=needed.accelerator_bytes,
        host=fixed_host_bytes(PLAN, spec(), machine),
        disk=needed.disk_bytes + streams,
        output=packed_bytes(PLAN, spec()),
    )
    check_room(PLAN, spec(), just)
    for name, what in (
        ("accelerator", "bytes of accelerator memory"),
        ("host", "bytes of host memory"),
        ("disk", "bytes of disk space for the job's folder"),
        ("output", "bytes of disk space for the output"),
    ):
        less = replace(just, **{name: int(0.7 * getattr(just, name))})
        message = refusal(spec(), less).message
        assert what in message
        assert f"{getattr(less, name):,} are free" in message
        assert message.count("are free") == 1


def test_hidden_states_wait_in_files_where_memory_is_short() -> None:
    """Of a hundred times the memory; only the disk limits them."""
    asked = spec(calibration={"sequences": 8192, "length": 4096})
    streams = stream_bytes(PLAN, asked, Machine())
    room = Room(accelerator=None, host=64 * GB, disk=2 * streams)
    assert streams > 10 * room.host
    check_room(PLAN, asked, room)
    assert "disk space for the job's folder" in refusal(asked, replace(room, disk=GB)).message


def test_the_largest_setting_that_fits_is_proposed() -> None:
    calibration = {"sequences": 8192, "length": 4096}
    room = Room(accelerator=None, host=64 * GB, disk=150 * GB)
    error = refusal(spec(calibration=calibration), room)
    assert error.param == "calibration.sequences"
    for name in calibration:
        proposed = re.search(rf"calibration\.{name} (\d+)", error.message)
        assert proposed is not None, error.message
        value = int(proposed.group(1))
        check_room(PLAN, spec(calibration=calibration | {name: value}), room)
        refusal(spec(calibration=calibration | {name: 2 * value}), room)


def test_windows_that_effort_filled_in_are_counted_and_fewer_proposed() -> None:
    best = {"code": "trellis", "effort": "best"}
    asked = spec(**best)
    machine = Machine(accelerator=True)
    assert estimate(PLAN, asked, machine) == estimate(
        PLAN, spec(**best, calibration={"sequences": 160}), machine
    )
    room = replace(AMPLE, accelerator=24 * GB, host=8 * GB)
    spilled = stream_bytes(PLAN, asked, machine) - room.host // 2
    room = replace(room, disk=estimate(PLAN, asked, machine).disk_bytes + int(0.9 * spilled))
    error = refusal(asked, room)
    assert error.param == "calibration.sequences"
    assert "what would fit: calibration.sequences 80" in error.message
    check_room(PLAN, spec(**best, calibration={"sequences": 64}), room)
    told = smaller_jobs(PLAN, asked, accelerator=True, less=2 * GB)
    assert told.startswith("what would fit by estimate: calibration.sequences 80")


def test_each_rank_needs_host_memory_and_fewer_devices_are_proposed() -> None:
    asked = spec(devices=8)
    room = replace(AMPLE, host=30 * GB)
    check_room(PLAN, asked.model_copy(update={"devices": 4}), room)
    error = refusal(asked, room)
    assert error.param == "devices"
    assert error.message.endswith("what would fit: devices 4")


def test_what_no_setting_helps_is_said() -> None:
    error = refusal(spec(), replace(AMPLE, accelerator=2 * GB))
    assert error.param == "model"
    assert error.message.endswith("no smaller calibration would fit")


def test_a_source_that_must_be_converted_needs_more() -> None:
    room = replace(AMPLE, disk=10 * GB)
    check_room(PLAN, spec(), room)
    message = refusal(spec(), room, gguf=True).message
    assert "disk space" in message
    assert "host memory" not in message  # tensors are converted one at a time


def test_baselines_and_tuned_blocks_are_kept_on_disk() -> None:
    packed = packed_bytes(PLAN, spec())
    room = replace(AMPLE, disk=int(2.5 * packed))
    check_room(PLAN, spec(), room)
    error = refusal(spec(evaluation={"baselines": ["uniform"]}), room)
    assert error.param == "evaluation.baselines"
    tuned = {"method": "omniquant", "omniquant": {"tune_scales_steps": 4}}
    assert refusal(spec(refinement=tuned), room).param == "refinement.omniquant.tune_scales_steps"


def test_a_search_keeps_tuned_blocks_of_two_maps() -> None:
    def copies(**changes: Any) -> float:
        asked = spec(**changes)
        return estimate(PLAN, asked, Machine()).disk_bytes / packed_bytes(PLAN, asked)

    tuned = {"method": "omniquant", "omniquant": {"tune_scales_steps": 4}}
    loss = {"max_loss_increase": 0.1}
    assert (copies(), copies(refinement=tuned)) == (2, 3)
    assert (copies(budget=loss), copies(budget=loss, refinement=tuned)) == (2, 4)


def test_ranks_have_the_smallest_device_of_theirs() -> None:
    rooms = [replace(AMPLE, accelerator=size * GB) for size in (80, 24, 80)]
    assert Room.of_ranks(rooms).accelerator == 24 * GB
    assert Room.of_ranks([replace(AMPLE, accelerator=None)] * 2).accelerator is None


def test_what_a_killed_run_left_counts_as_free(tmp_path: Path) -> None:
    (tmp_path / "work" / "refine").mkdir(parents=True)
    (tmp_path / "work" / "refine" / "block").write_bytes(bytes(200 << 20))
    cpu = torch.device("cpu")
    other = Room.here(cpu, tmp_path / "other", tmp_path / "out")
    room = Room.here(cpu, tmp_path / "work", tmp_path / "out")
    assert room.accelerator is None
    assert room.output is None
    assert GB // 10 < room.host < 10**5 * GB
    assert room.disk - other.disk == pytest.approx(200 << 20, rel=0.5)


def test_a_job_that_does_not_fit_begins_no_stage(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    asked = spec(calibration={"sequences": 65536, "length": 131072})
    events: list[object] = []
    with pytest.raises(ResourceError, match=r"would fit: calibration\.sequences \d+"):
        run_job(asked, model, tmp_path / "work", tmp_path / "out", on_progress=events.append)
    assert events == []
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("accelerator", [True, False])
@pytest.mark.parametrize("less", [0, GB, 4 * GB])
def test_what_would_fit_needs_that_much_less(accelerator: bool, less: int) -> None:
    asked = spec(calibration={"sequences": 512, "length": 4096})
    told = smaller_jobs(PLAN, asked, accelerator=accelerator, less=less)
    spared = [int(n.replace(",", "")) for n in re.findall(r"\(([\d,]+) bytes less\)", told)]
    assert told.startswith("what would fit by estimate: calibration.")
    assert all(bytes_ >= max(less, 1) for bytes_ in spared)


def test_where_nothing_smaller_would_fit_that_is_said() -> None:
    assert "a larger machine" in smaller_jobs(PLAN, spec(), accelerator=True, less=1 << 60)
