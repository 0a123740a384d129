"""Hidden states on their way between host memory and an accelerator that goes on computing.

A copy between ordinary host memory and a CUDA device goes through the driver's own buffers, a few
GB/s, and whoever asks for it waits. Here such copies go through pieces of page-locked memory, made
once and used in turn:

    load    host -> piece -> device       of the next batch, while this one is computed
    store   device -> piece -> host       behind the batch that it comes from, without waiting

The device's half of every copy is made on one stream of its own, in the order asked for. A piece is
taken again when that half of its last copy is done; what a store brought goes to its place then, or
when the pass ends. Host memory that is page-locked itself takes no piece. Where the system refuses
page-locked memory, copies are the plain ones; on a CPU there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitmill.plan.block_memory import TRANSFER_BYTES

PIECE_BYTES = 32 << 20
"""A power of two: PyTorch's page-locked memory comes in these."""


class Done(Protocol):
    """A point among copies."""

    def synchronize(self) -> None:
        """Return when all copies before it are made."""


class Lane(Protocol):
    """Makes copies in the order asked for, beside what is computed."""

    def buffer(self, size: int) -> Tensor | None:
        """Page-locked memory, u8 [size], or None where the system refuses it."""

    def follow(self) -> None:
        """Copies to come wait for all that was launched by now."""

    def copy(self, place: Tensor, value: Tensor) -> Done:
        """Begin to copy. What is not on the host may be dropped if it is the value, or if what is
        launched before waits for this."""

    def precede(self, done: Done) -> None:
        """What is launched from now on waits for these copies."""


class CudaLane:
    """A stream beside the current one of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def buffer(self, size: int) -> Tensor | None:
        """See `Lane`."""
        try:
            with torch.inference_mode(False):
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            return None

    def follow(self) -> None:
        """See `Lane`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, place: Tensor, value: Tensor) -> torch.cuda.Event:
        """See `Lane`."""
        with torch.cuda.stream(self._stream):
            place.copy_(value, non_blocking=True)
            if value.is_cuda:
                value.record_stream(self._stream)
        done = torch.cuda.Event(blocking=True)
        done.record(self._stream)
        return done

    def precede(self, done: Done) -> None:
        """See `Lane`."""
        assert isinstance(done, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(done)


@dataclass(eq=False)
class _Piece:
    """done: its last copy. landing: where that is to go, u8, or None."""

    buffer: Tensor
    done: Done | None = None
    landing: Tensor | None = None

    def settle(self) -> None:
        """Wait for the last copy, and bring it where it is to go."""
        done, self.done = self.done, None
        landing, self.landing = self.landing, None
        if done is not None:
            done.synchronize()
        if landing is not None:
            landing.copy_(self.buffer[: len(landing)])


class Transfers:
    """Copies to and from one device, by one thread.

    lane: what makes them; None takes a CUDA device's own, and on a CPU none.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        self._device = device
        self._lane = CudaLane(device) if lane is None and device.type == "cuda" else lane
        self._pieces: list[_Piece] = []
        self._most = TRANSFER_BYTES // PIECE_BYTES
        self._next = 0
        self._last: Done | None = None

    def batches(
        self, tensors: Sequence[Tensor], parts: Iterable[slice]
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Each part of the tensors [S, ...] on the device, and which it is.

        What lies there is not copied. Of tensors in host memory, contiguous ones, the next part is
        on its way while the caller works on one, so no part may follow from an earlier one. Stores
        of the caller are in their places when the last part was taken (see `finish`).
        """
        waiting: tuple[slice, list[Tensor], Done | None] | None = None
        try:
            for part in parts:
                loaded = part, *self._load([tensor[part] for tensor in tensors])
                if waiting is not None:
                    yield self._arrived(*waiting)
                waiting = loaded
            if waiting is not None:
                yield self._arrived(*waiting)
        except BaseException:
            self._abandon()
            raise
        self.finish()

    def store(self, place: Tensor, value: Tensor) -> None:
        """Begin to copy a value of the device to its place, a contiguous one, of equal shape.

        The value may be dropped, not changed.
        """
        lane = self._lane_of(place)
        if lane is None:
            place.copy_(value, non_blocking=True)
            return
        value = value.detach().to(place.dtype).contiguous()
        lane.follow()
        if place.is_pinned():
            self._last = lane.copy(place, value)
            return
        for given, landing in _pairs(value, place):
            piece = self._take()
            piece.done = self._last = lane.copy(piece.buffer[: len(given)], given)
            piece.landing = landing

    def finish(self) -> None:
        """Have all stores in their places: where that is page-locked memory for what is launched
        from now on, else at once."""
        for piece in (*self._pieces[self._next :], *self._pieces[: self._next]):
            if piece.landing is not None:
                piece.settle()
        self._join()

    def _load(self, tensors: list[Tensor]) -> tuple[list[Tensor], Done | None]:
        """The tensors on the device, and when they will be there."""
        loaded, last = [], None
        for tensor in tensors:
            lane = self._lane_of(tensor)
            if lane is None:
                loaded.append(tensor.to(self._device, non_blocking=True))
                continue
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            lane.follow()  # the memory of `made` may be in use until then
            if tensor.is_pinned():
                last = lane.copy(made, tensor)
            else:
                for given, place in _pairs(tensor, made):
                    piece = self._take()
                    own = piece.buffer[: len(given)].copy_(given)
                    piece.done = last = lane.copy(place, own)
            loaded.append(made)
        self._last = self._last if last is None else last
        return loaded, last

    def _arrived(
        self, part: slice, tensors: list[Tensor], done: Done | None
    ) -> tuple[slice, list[Tensor]]:
        if done is not None and self._lane is not None:
            self._lane.precede(done)
        return part, tensors

    def _lane_of(self, tensor: Tensor) -> Lane | None:
        """What copies a tensor to or from the device; None for one there, or without a lane."""
        if self._lane is None or tensor.device.type != "cpu":
            return None
        return self._lane if tensor.is_pinned() or self._has_pieces() else None

    def _has_pieces(self) -> bool:
        if not self._pieces and self._most:
            self._grow()
        return bool(self._pieces)

    def _grow(self) -> None:
        buffer = None if self._lane is None else self._lane.buffer(PIECE_BYTES)
        if buffer is None:
            self._most = len(self._pieces)
        else:
            self._pieces.append(_Piece(buffer))

    def _take(self) -> _Piece:
        """The next piece, free."""
        if self._next == len(self._pieces):
            if len(self._pieces) < self._most:
                self._grow()
            self._next %= len(self._pieces)
        piece = self._pieces[self._next]
        self._next += 1
        piece.settle()
        return piece

    def _join(self) -> None:
        if self._lane is not None and self._last is not None:
            self._lane.precede(self._last)
        self._last = None

    def _abandon(self) -> None:
        """Let go of what was under way; a failed pass leaves its places as they are by now."""
        for piece in self._pieces:
            piece.landing = None
        self._join()


def _pairs(value: Tensor, place: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in pieces u8, of contiguous tensors of one shape and dtype."""
    if value.numel():
        flat = (tensor.view(-1).view(torch.uint8) for tensor in (value, place))
        yield from zip(*(each.split(PIECE_BYTES) for each in flat), strict=True)
