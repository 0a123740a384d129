"""Batches reach the device, and results the host, as they were, however late the copies are."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitmill.calibration.gradients import GradientPass, PassSettings
from bitmill.calibration.hooks import batches
from bitmill.plan.block_memory import TRANSFER_BYTES
from bitmill.runtime import transfers
from bitmill.runtime.transfers import PIECE_BYTES, Transfers
from streaming import streamed, token_windows
from tiny import tiny_llama

CPU = torch.device("cpu")
VALUES = torch.arange(7 * 5 * 3.0).view(7, 5, 3).to(torch.bfloat16)


class LateLane:
    """Copies on a CPU that are made when somebody waits for them, and no sooner."""

    def __init__(self, buffers: int = 1000) -> None:
        self.buffers, self.made, self.begun = buffers, 0, 0
        self._pending: deque[tuple[Tensor, Tensor]] = deque()

    def buffer(self, size: int) -> Tensor | None:
        if not self.buffers:
            return None
        self.buffers -= 1
        return torch.zeros(size, dtype=torch.uint8)

    def follow(self) -> None:
        pass

    def copy(self, place: Tensor, value: Tensor) -> Point:
        self._pending.append((place, value))
        self.begun += 1
        return Point(self, self.begun)

    def precede(self, done: Point) -> None:
        done.synchronize()

    def make(self, count: int) -> None:
        while self.made < count:
            place, value = self._pending.popleft()
            place.copy_(value)
            self.made += 1


class Point:
    """After so many copies of a lane."""

    def __init__(self, lane: LateLane, count: int) -> None:
        self._lane, self._count = lane, count

    def synchronize(self) -> None:
        self._lane.make(self._count)


@pytest.fixture(params=[6, 16, 64, PIECE_BYTES])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a piece, of which there are four."""
    monkeypatch.setattr(transfers, "PIECE_BYTES", request.param)
    monkeypatch.setattr(transfers, "TRANSFER_BYTES", min(4 * request.param, TRANSFER_BYTES))
    return request.param


def parts(batch: int):
    return batches(len(VALUES), batch)


def twice(moved: Transfers, tensors: list[Tensor], out: list[Tensor], batch: int) -> None:
    """Doubles tensors, batch by batch."""
    for part, loaded in moved.batches(tensors, parts(batch)):
        for x, place in zip(loaded, out, strict=True):
            moved.store(place[part], 2 * x)


def gradients_of(folder: Path, lane: LateLane | None) -> list[Tensor]:
    """At every block's input, from the last to the first, of a pass whose copies a lane makes."""
    model, found = streamed(folder), list[Tensor]()
    model.transfers = Transfers(CPU, lane)
    GradientPass(model, token_windows(8), PassSettings(batch=3, host_bytes=10**9, every=2)).run(
        lambda _: None, on_block=lambda _, gradient: found.append(gradient.clone())
    )
    model.close()
    return found


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("buffers", [0, 1, 2, 1000])
def test_a_pass_over_host_memory_gives_what_it_would_without_copies(
    size: int, batch: int, buffers: int
) -> None:
    lane = LateLane(buffers)
    moved = Transfers(CPU, lane)
    one, two, out = VALUES.clone(), -VALUES, torch.full_like(VALUES, torch.nan)
    for _ in range(2):
        twice(moved, [one, two], [one, out], batch)
        assert torch.equal(out, -2 * VALUES)
    assert torch.equal(one, 4 * VALUES)
    assert (lane.begun > 0) == (buffers > 0)
    twice(moved, [out], [out], batch)
    assert torch.equal(out, -4 * VALUES)


@pytest.mark.parametrize("pieces", [4, 1000])
def test_a_gradient_pass_finds_the_same_bits_however_late_its_copies_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr(transfers, "PIECE_BYTES", 3000)
    monkeypatch.setattr(transfers, "TRANSFER_BYTES", pieces * 3000)
    folder, late = tiny_llama(tmp_path / "model", num_hidden_layers=3), LateLane()
    expected, found = gradients_of(folder, None), gradients_of(folder, late)
    assert late.begun == late.made > 0
    assert len(expected) == 3
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_the_next_part_is_on_its_way_before_this_one_is_done(size: int) -> None:
    lane = LateLane()
    moved, seen = Transfers(CPU, lane), []
    for _ in moved.batches([VALUES], parts(1)):
        seen.append((lane.made, lane.begun))
    assert all(made < begun for made, begun in seen[:-1])
    assert seen[-1][0] == seen[-1][1]


def test_page_locked_memory_stays_within_its_limit(size: int) -> None:
    lane = LateLane()
    twice(Transfers(CPU, lane), [VALUES], [VALUES.clone()], 2)
    assert (1000 - lane.buffers) * size <= min(4 * size, TRANSFER_BYTES)


def test_stores_alone_are_in_their_places_when_asked_for() -> None:
    moved, out = Transfers(CPU, LateLane()), torch.zeros_like(VALUES)
    for part in parts(3):
        moved.store(out[part], VALUES[part].float())
    moved.finish()
    assert torch.equal(out, VALUES)
    moved.store(out[:0], VALUES[:0])
    assert [len(x) for _, (x,) in moved.batches([VALUES[:0]], [slice(0, 2)])] == [0]


def test_what_a_failed_pass_stored_reaches_no_place_later() -> None:
    moved, out = Transfers(CPU, LateLane()), torch.zeros_like(VALUES)
    with pytest.raises(ArithmeticError):
        for part, (x,) in moved.batches([VALUES], parts(2)):
            moved.store(out[part], x)
            raise ArithmeticError
    out.fill_(3)
    twice(moved, [VALUES], [VALUES.clone()], 1)
    moved.finish()
    assert (out == 3).all()


def test_a_cpu_hands_out_the_tensors_themselves() -> None:
    moved = Transfers(CPU)
    for part, (x,) in moved.batches([VALUES], parts(2)):
        assert x.data_ptr() == VALUES[part].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("where", ["ordinary", "locked", "device", "mixed"])
@pytest.mark.parametrize("wide", [1 << 10, 9 << 20])
def test_copies_beside_slow_kernels_hold_the_same_values(where: str, wide: int) -> None:
    """Kernels that take longer than copies, and memory that is taken again at once."""
    device = torch.device("cuda")
    moved, generator = Transfers(device), torch.Generator().manual_seed(0)
    first = torch.randn(9, wide, generator=generator).to(torch.bfloat16)
    second = torch.randn(9, wide, generator=generator).to(torch.bfloat16)
    one, two = first.clone(), second.clone()
    if where == "device":
        one, two = one.to(device), two.to(device)
    elif where != "ordinary":
        one = one.pin_memory()
        two = two.pin_memory() if where == "locked" else two
    for turn in range(4):
        for part, (x, y) in moved.batches([one, two], batches(9, 2)):
            torch.cuda._sleep(3_000_000 if turn % 2 else 1)
            total, difference = x + y, x - y
            moved.store(one[part], total)
            moved.store(two[part], difference)
            del x, y, total, difference
            torch.full((2, wide), torch.nan, dtype=torch.bfloat16, device=device)
        if where == "locked":
            torch.cuda.synchronize()
        a, b = first.to(device), second.to(device)
        first, second = (a + b).cpu(), (a - b).cpu()
        if where in ("ordinary", "locked"):
            assert torch.equal(one, first)
        assert torch.equal(one.to(device).cpu(), first)
        assert torch.equal(two.to(device).cpu(), second)
