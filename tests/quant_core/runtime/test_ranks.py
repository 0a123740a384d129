"""Ranks that work together: the group alone, and jobs of real processes over gloo."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.quantization import parse_config
from bitmill.errors import CalibrationError, ProcessFailed, ResourceError, SpecError
from bitmill.refinement.model import RefinedModel
from bitmill.runtime.launch import check_devices
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.solvers.gptq.solve import Curvature
from rank_function import on_ranks
from ranks_job import assert_near, bytes_of, ranks_job
from tiny import tiny_llama

SPEC = {"budget": {"bits": 3}}


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_parts_are_contiguous_and_take_everything_once(size: int, count: int) -> None:
    parts = [Ranks(rank, size).part(count) for rank in range(size)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    lengths = [part.stop - part.start for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


def test_work_goes_to_the_idlest_rank() -> None:
    assert Ranks(0, 2).owners([96, 32, 64, 86]) == [0, 0, 1, 1]
    assert Ranks(1, 3).owners([1, 1, 1, 1]) == [0, 1, 2, 0]
    assert SINGLE.owners([3, 1]) == [0, 0]


def work_in_a_group(group: Ranks, out: str, how: str = "well") -> None:
    """Every operation of a group, in `<rank>.json` of `out`; how: how the second rank ends."""
    part = torch.tensor([1e8, 1.0, -1e8, 0.5])[group.rank :][:1].repeat(3)
    group.all_reduce(part)
    rows = torch.arange(20.0).view(5, 4)[group.part(5)]
    mine = torch.full((2, 3), float(group.rank))
    group.share(mine, 1)
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    H, ridges = x.T @ x / 300, (0.0, 0.05, 0.5, 1.0)
    alone, divided = Curvature.prepare(H), Curvature.prepare(H, ridges=ridges, ranks=group)
    solved = [torch.equal(divided.solve(x, r), alone.solve(x, r)) for r in ridges]
    found = {
        "solved": [*solved, sorted(divided.solvers), divided.factor.damping],
        "sum": part.tolist(),
        "rows": group.gather_rows(rows, 5).tolist(),
        "bytes": group.gather_rows(rows[:, :1].byte(), 5).flatten().tolist(),
        "ranks": group.gather(group.rank),
        "first": group.broadcast(group.rank + 10),
        "total": group.total(0.5),
        "totals": group.totals(torch.tensor([1e16, 1.0, -1e16])[group.rank :][:1].double()),
        "shared": mine.tolist(),
    }
    if group.rank == 1 and how != "well":
        fail(group, how)
    group.barrier()
    Path(out, f"{group.rank}.json").write_text(json.dumps(found))


class Large:
    """More than a machine has, where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (torch.empty, (1 << 48,))


def fail(group: Ranks, how: str) -> None:
    if how == "refuse":
        raise CalibrationError("bad rows", param="tokens", hint="Look at them.")
    if how == "fill":
        with open("/dev/full", "w") as full:
            full.write("x" * 99999)
    if how == "memory":
        group.gather(Large())
    if how == "no room to say so":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    raise ValueError("no such thing")


def test_sums_are_taken_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    """(1e8 + 1) - 1e8 is 0 in float32; in another order it would be 1."""
    on_ranks(3, work_in_a_group, tmp_path)
    for rank in range(3):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {
            "solved": [True, True, True, True, [0.05, 0.5, 1.0], 0.005],
            "sum": [0.0, 0.0, 0.0],
            "rows": torch.arange(20.0).view(5, 4).tolist(),
            "bytes": [0, 4, 8, 12, 16],
            "ranks": [0, 1, 2],
            "first": 10,
            "total": 1.5,
            "totals": [0.0],
            "shared": [[1.0] * 3] * 2,
        }


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_the_caller_keeps_its_signal_handlers(tmp_path: Path, ends: str) -> None:
    own = signal.signal(signal.SIGUSR1, lambda *_: None)
    before = [signal.getsignal(one) for one in ENDING]
    try:
        with nullcontext() if ends == "well" else pytest.raises(CalibrationError):
            on_ranks(2, work_in_a_group, tmp_path, "well" if ends == "well" else "refuse")
        assert [signal.getsignal(one) for one in ENDING] == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGUSR1, own)


def test_the_launcher_raises_what_a_rank_raised(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="bad rows") as refused:
        on_ranks(2, work_in_a_group, tmp_path, "refuse")
    assert (refused.value.code, refused.value.param) == ("invalid_calibration", "tokens")
    assert refused.value.hint == "Look at them."
    with pytest.raises(ProcessFailed, match="ValueError: no such thing"):
        on_ranks(2, work_in_a_group, tmp_path, "break")
    assert not list(tmp_path.iterdir())
    assert "BITMILL_LAUNCHER" not in os.environ


@pytest.mark.parametrize(
    ("how", "code"),
    [("fill", "disk_full"), ("memory", "out_of_memory"), ("no room to say so", "disk_full")],
)
def test_what_a_rank_lacked_is_told_as_that(tmp_path: Path, how: str, code: str) -> None:
    with pytest.raises(ResourceError) as lacking:
        on_ranks(2, work_in_a_group, tmp_path, how)
    assert lacking.value.code == code


def test_more_devices_than_there_are_and_learning_on_several_are_refused() -> None:
    check_devices(1, "cpu")
    with pytest.raises(
        ResourceError, match=r"asks for 999 devices, this machine has \d+ CPU cores"
    ):
        check_devices(999, "cpu")
    with pytest.raises(SpecError, match="devices 2 with refinement 'omniquant'"):
        parse_config(SPEC | {"devices": 2, "refinement": {"method": "omniquant"}})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RefinedModel]:
    out = tmp_path_factory.mktemp("alone")
    return out, ranks_job(model, out)


def job(group: Ranks, model: str, out: str, die: str | None = None) -> None:
    ranks_job(Path(model), Path(out), group, None if die is None else int(die))


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks make undisturbed."""
    out = tmp_path_factory.mktemp("pair")
    on_ranks(2, job, model, out)
    return out


def mentioning(word: str) -> list[int]:
    """Processes whose command line holds the word."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and word in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def assert_like_one_rank(out: Path, alone: tuple[Path, RefinedModel]) -> None:
    """The same windows, map and orders, byte for byte; errors but for rounding, and the codes that
    come before a rounded sum can have grown. Behind the first step a grown sum may also decide
    whether a linear is corrected, which changes what all later ones see."""
    folder, _ = alone
    for name in ("windows.json", "orders.npz"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    found, expected = (SensitivityProfile.load(at / "sba.npz") for at in (out, folder))
    for name, record in expected.sba[3].items():
        assert (found.sba[3][name].salience == record.salience).all()
    reports = assert_near(out, alone, costs=0.01, codes=0.99)
    alike = list(takewhile(lambda pair: pair[0].asymmetric == pair[1].asymmetric, reports))
    assert len(alike) >= 3
    for mine, other in alike:
        assert mine.relative_error == pytest.approx(other.relative_error, rel=0.02), mine.name


@pytest.mark.e2e
def test_two_ranks_do_what_one_does_and_repeat_it_byte_for_byte(
    model: Path, alone: tuple[Path, RefinedModel], pair: Path, tmp_path: Path
) -> None:
    assert_like_one_rank(pair, alone)
    on_ranks(2, job, model, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(pair)


@pytest.mark.e2e
def test_three_ranks_with_fewer_held_out_windows_than_ranks(
    model: Path, alone: tuple[Path, RefinedModel], tmp_path: Path
) -> None:
    on_ranks(3, job, model, tmp_path)
    assert_like_one_rank(tmp_path, alone)


@pytest.mark.e2e
def test_a_killed_rank_ends_all_and_the_next_run_goes_on_at_the_last_finished_block(
    model: Path, pair: Path, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match="rank 1 of 2 was ended by signal 9") as killed:
        on_ranks(2, job, model, tmp_path, 1)
    assert killed.value.code == "killed"
    assert not mentioning(str(tmp_path))
    first = tmp_path / "refine" / "block-00000.safetensors"
    written = first.stat().st_mtime_ns
    on_ranks(2, job, model, tmp_path)
    assert first.stat().st_mtime_ns == written
    assert bytes_of(tmp_path) == bytes_of(pair)


LAUNCHER = """
import sys
from bitmill.runtime.launch import run_ranks
run_ranks(2, ["-c", sys.argv[2], sys.argv[1]])
"""
WAITING = """
import sys, time, pathlib
from bitmill.runtime.launch import as_rank
with as_rank("cpu") as (group, device):
    pathlib.Path(sys.argv[1], str(group.rank)).touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path, signum: signal.Signals) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, tmp_path, WAITING])
    limit = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < limit
        assert launcher.poll() is None
        time.sleep(0.05)
    assert len(mentioning(str(tmp_path))) == 3
    launcher.send_signal(signum)
    assert launcher.wait() == (-signum if signum == signal.SIGKILL else 128 + signum)
    while mentioning(str(tmp_path)):
        assert time.monotonic() < limit
        time.sleep(0.05)
