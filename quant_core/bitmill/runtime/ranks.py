"""The group of ranks that work on one job: one process and one accelerator each, on one machine.

Windows of tokens are divided among the ranks in contiguous parts, earlier ranks taking what is
left over; what is summed over tokens is then added up over ranks:

    total = ((part_0 + part_1) + part_2) + ...       on every rank, whatever the network library

so all ranks hold the same bits, and a run with as many ranks gives them again. They differ from
one rank's by the rounding of that order. A group of one is the default and does nothing.

Ranks that torchrun started (`launch.py`, or `python -m torch.distributed.run`) enter by `joined`:
NCCL between CUDA devices, gloo for the rest. Every rank must make the same calls in the same order;
a rank that finds another one gone raises `PeerLost`, and the launcher ends what is left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bitmill.errors import BitmillError, raise_resource_error
from bitmill.runtime.device import device_of

_PIECE = 1 << 24
"""Values that are exchanged at once: 64 MiB of f32 per rank."""

_SMALL = 1 << 12
"""Sums of up to so many values share an exchange."""

_PATIENCE = timedelta(days=7)
"""The launcher notices a dead rank, so no call needs a limit of its own."""

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The older of the two names goes with torch 2.13."""

T = TypeVar("T")


class PeerLost(BitmillError):
    """Another rank of the job ended; the reason is the other rank's."""

    code = "peer_lost"


@dataclass(frozen=True)
class Ranks:
    """A group of one rank: every call answers at once. `_SeveralRanks` is a group of several."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and reports."""
        return self.rank == 0

    def part(self, count: int, rank: int | None = None, *, unit: int = 1) -> slice:
        """The contiguous share of `count` things that a rank (this one by default) takes.

        unit: things that stay together; the last ones may be fewer.
        """
        rank = self.rank if rank is None else rank
        least, more = divmod(-(-count // unit), self.size)
        start = rank * least + min(rank, more)
        stop = start + least + (rank < more)
        return slice(min(count, start * unit), min(count, stop * unit))

    def owners(self, weights: Sequence[float]) -> list[int]:
        """The rank that takes each of some pieces of work: the heaviest first, to the idlest."""
        loads, owners = [0.0] * self.size, [0] * len(weights)
        for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
            owners[i] = min(range(self.size), key=loads.__getitem__)
            loads[owners[i]] += weights[i]
        return owners

    def shard(self, windows: Tensor) -> Tensor:
        """This rank's windows of all [S, ...]; none where there are fewer than ranks."""
        return windows[self.part(len(windows))]

    def all_reduce(self, *sums: Tensor) -> None:
        """Add up contiguous tensors over ranks, in place, in the order of the ranks."""

    def gather_rows(self, rows: Tensor, count: int, *, unit: int = 1) -> Tensor:
        """All `count` rows [count, ...], of which this rank brings its `part`."""
        return rows

    def gather(self, value: T) -> list[T]:
        """What every rank brings, a picklable value, in the order of the ranks."""
        return [value]

    def total(self, value: float) -> float:
        """A sum over ranks, in float64."""
        return value

    def totals(self, values: Tensor) -> list[float]:
        """Sums over ranks of float64 values [M] on a device, in the order of the ranks."""
        return [float(value) for value in values.tolist()]

    def share(self, tensor: Tensor, owner: int) -> None:
        """Fill a contiguous tensor with the one of the rank `owner`."""

    def broadcast(self, value: T) -> T:
        """The first rank's picklable value."""
        return value

    def barrier(self) -> None:
        """Wait until every rank is here."""


SINGLE = Ranks()


@dataclass(frozen=True)
class _SeveralRanks(Ranks):
    """Several ranks in torch.distributed's default process group.

    meeting: makes the accelerators' connections, which takes NCCL most of a second, beside other
    work; no other call may come before the one that it makes.
    """

    meeting: Thread | None = None

    def all_reduce(self, *sums: Tensor) -> None:
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in sums:
            if tensor.numel() <= _SMALL:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor.view(-1))
                continue
            for piece in tensor.view(-1).split(_PIECE):
                self._add_up(piece)
        for alike in small.values():
            joined = torch.cat(alike)
            self._add_up(joined)
            for tensor, total in zip(alike, joined.split([len(t) for t in alike]), strict=True):
                tensor.copy_(total)

    def _add_up(self, values: Tensor) -> None:
        first, *others = self._all(values)
        for other in others[:-1]:
            first += other
        torch.add(first, others[-1], out=values)

    def gather_rows(self, rows: Tensor, count: int, *, unit: int = 1) -> Tensor:
        parts = [self.part(count, rank, unit=unit) for rank in range(self.size)]
        most = parts[0].stop - parts[0].start
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        found = self._all(padded)
        return torch.cat(
            [one[: part.stop - part.start] for one, part in zip(found, parts, strict=True)]
        )

    def _all(self, own: Tensor) -> list[Tensor]:
        """What every rank brings, tensors of one shape, in the order of the ranks."""
        self._meet(own)
        found = own.new_empty(self.size * own.numel())
        with _peers():
            _gather_into(found, own.reshape(-1))
        return list(found.view(self.size, *own.shape))

    def total(self, value: float) -> float:
        return float(sum(self._all(torch.tensor(value, dtype=torch.float64))))

    def totals(self, values: Tensor) -> list[float]:
        first, *others = self._all(values)
        return super().totals(reduce(torch.add, others, first))

    def share(self, tensor: Tensor, owner: int) -> None:
        self._meet(tensor)
        with _peers():
            dist.broadcast(tensor, owner)

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T) -> T:
        found = [value]
        with _peers():
            dist.broadcast_object_list(found, device=torch.device("cpu"))
        return found[0]

    def barrier(self) -> None:
        self.gather(None)

    def _meet(self, tensor: Tensor) -> None:
        if tensor.is_cuda and self.meeting is not None:
            self.meeting.join()


def _exchange(device: torch.device) -> None:
    """A first exchange; where it fails the next one says why."""
    with suppress(RuntimeError), torch.cuda.device(device):
        dist.broadcast(torch.zeros(1, device=device), 0)


@contextmanager
def _peers() -> Iterator[None]:
    """Tell a lost peer from errors of one's own."""
    try:
        yield
    except RuntimeError as error:
        raise_resource_error(error)
        raise PeerLost(f"another rank of this job is gone: {str(error)[:200]}") from error


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """The group of the ranks that torchrun started, and this rank's device; else a group of one.

    device: as asked for; each rank of a group on "cuda" takes the GPU of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    if size == 1:
        yield SINGLE, device_of(device)
        return
    where = torch.device(device)
    backend = "gloo"
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
        backend = "cpu:gloo,cuda:nccl"
    with _peers():
        dist.init_process_group(backend, timeout=_PATIENCE)
    meeting = None
    if backend != "gloo":
        meeting = Thread(target=_exchange, args=(where,), daemon=True)
        meeting.start()
    group = _SeveralRanks(dist.get_rank(), size, meeting)
    yield group, where
    group.barrier()
    if meeting is not None:  # gloo's threads may abort the process when they are taken down
        meeting.join()
        dist.destroy_process_group()
