"""What a machine has left for a job, and the refusal of a job that needs more.

A job is refused where a need that cannot give way exceeds what is free:

    accelerator memory   the estimate of each device
    host memory          the estimate without the windows' hidden states, which may wait in files
    disk                 the estimate, and those hidden states that half of the free host memory
                         does not hold; not the inputs of blocks that a backward pass goes through

What a killed run of the same job left in its folder counts as free.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from bitmill.config.quantization import QuantizationConfig, Refinement
from bitmill.errors import ResourceError
from bitmill.io.targets import existing
from bitmill.pipeline.estimate import (
    OVERHEAD,
    Machine,
    estimate,
    fixed_host_bytes,
    packed_bytes,
    stream_bytes,
)
from bitmill.plan.model_plan import Plan
from bitmill.runtime.memory import free_device_bytes, free_host_bytes, own_host_bytes

_SHORTEST = 128
"""Tokens of the shortest window that is proposed."""


@dataclass(frozen=True)
class Room:
    """Bytes that a job may take.

    accelerator: of each device, None on a CPU. disk: where the job works; output: where its result
    goes, None where that is the same file system.
    """

    accelerator: int | None
    host: int
    disk: int
    output: int | None = None

    @classmethod
    def here(cls, device: torch.device, work: Path, output: Path) -> Self:
        """What is free on this machine now, for a job in the folder `work`."""
        at, to = existing(work), existing(output)
        apart = at.stat().st_dev != to.stat().st_dev
        return cls(
            accelerator=free_device_bytes(device) if device.type == "cuda" else None,
            host=free_host_bytes() + own_host_bytes(),
            disk=shutil.disk_usage(at).free + _held_bytes(work),
            output=shutil.disk_usage(to).free if apart else None,
        )

    @classmethod
    def of_ranks(cls, rooms: Sequence[Self]) -> Self:
        """The room of a job whose ranks have these: of one host, and devices of their own."""
        devices = [room.accelerator for room in rooms if room.accelerator is not None]
        return replace(rooms[0], accelerator=min(devices, default=None))


def _held_bytes(folder: Path) -> int:
    held = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                held += os.stat(Path(parent, name), follow_symlinks=False).st_blocks * 512
    return held


@dataclass(frozen=True)
class _Lack:
    """A need that exceeds what is free, both in bytes."""

    what: str
    needed: int
    free: int

    def __str__(self) -> str:
        return f"{self.needed:,} bytes of {self.what}, of which {self.free:,} are free"


def check_room(plan: Plan, config: QuantizationConfig, room: Room, *, gguf: bool = False) -> None:
    """Raise `ResourceError` (code `does_not_fit`) where the job does not fit, saying what would.

    gguf: the source must be converted first.
    """
    lacking = list(_lacking(plan, config, room, gguf))
    if not lacking:
        return
    fitting: dict[str, str] = {}
    for name, value, smaller in _smaller(config):
        if name not in fitting and not any(_lacking(plan, smaller, room, gguf)):
            fitting[name] = f"{name} {json.dumps(value)}"
    advice = "no smaller calibration would fit"
    if fitting:
        advice = f"what would fit: {', or '.join(fitting.values())}"
    raise ResourceError(
        f"the job needs {', and '.join(map(str, lacking))}; {advice}",
        code="does_not_fit",
        param=next(iter(fitting), "model"),
    )


def smaller_jobs(plan: Plan, config: QuantizationConfig, *, accelerator: bool, less: int) -> str:
    """In words, the largest settings with which the job is estimated to need `less` bytes less."""
    needed = _held_at_once(plan, config, accelerator)
    fitting: dict[str, str] = {}
    for name, value, smaller in _smaller(config):
        spared = needed - _held_at_once(plan, smaller, accelerator)
        if name not in fitting and spared >= max(less, 1):
            fitting[name] = f"{name} {json.dumps(value)} ({spared:,} bytes less)"
    if not fitting:
        return "no smaller calibration would fit: take a smaller model or a larger machine"
    return f"what would fit by estimate: {', or '.join(fitting.values())}"


def _held_at_once(plan: Plan, config: QuantizationConfig, accelerator: bool) -> int:
    """Memory of all kinds that a job is estimated to need."""
    needed = estimate(plan, config, Machine(accelerator=accelerator))
    return needed.host_bytes + (needed.accelerator_bytes if accelerator else 0)


def _smaller(config: QuantizationConfig) -> Iterator[tuple[str, Any, QuantizationConfig]]:
    """(a setting, its value, the configuration with it): jobs that need less, the largest first."""
    calibration = config.calibration
    for sequences in _halves(calibration.sequences, 1):
        part = calibration.model_copy(update={"sequences": sequences})
        yield "calibration.sequences", sequences, _with(config, calibration=part)
    for length in _halves(calibration.length, _SHORTEST):
        part = calibration.model_copy(update={"length": length})
        yield "calibration.length", length, _with(config, calibration=part)
    for setting, value, method in config.method.lighter():
        lighter = Refinement.of(method, config.refinement.transforms)
        yield Refinement.place(setting), value, _with(config, refinement=lighter)
    for devices in _halves(config.devices, 1):
        yield "devices", devices, _with(config, devices=devices)
    if config.evaluation.baselines:
        alone = config.evaluation.model_copy(update={"baselines": ()})
        yield "evaluation.baselines", [], _with(config, evaluation=alone)


def _with(config: QuantizationConfig, **parts: Any) -> QuantizationConfig:
    return config.model_copy(update=parts)


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _lacking(plan: Plan, config: QuantizationConfig, room: Room, gguf: bool) -> Iterator[_Lack]:
    machine = Machine(accelerator=room.accelerator is not None)
    needed = estimate(plan, config, machine, gguf=gguf)
    if room.accelerator is not None and needed.accelerator_bytes - OVERHEAD > room.accelerator:
        device = needed.accelerator_bytes - OVERHEAD  # a context is there already
        yield _Lack("accelerator memory", device, room.accelerator)
    fixed = fixed_host_bytes(plan, config, machine, gguf=gguf)
    if fixed > room.host:
        yield _Lack("host memory", fixed, room.host)
    disk = needed.disk_bytes + _spilled_bytes(plan, config, machine, room)
    if disk > room.disk:
        yield _Lack("disk space for the job's folder", disk, room.disk)
    packed = packed_bytes(plan, config)
    if room.output is not None and packed > room.output:
        yield _Lack("disk space for the output", packed, room.output)


def _spilled_bytes(plan: Plan, config: QuantizationConfig, machine: Machine, room: Room) -> int:
    """What of the windows' hidden states waits in files of the job's folder."""
    streams = stream_bytes(plan, config, machine)
    if room.accelerator is not None and streams <= room.accelerator // 3:
        return 0
    return max(0, streams - room.host // 2)
