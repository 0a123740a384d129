"""Loading the next block while the present one computes.

Stages walk the blocks in order, forwards or backwards. After block i is handed out, the next one in
that direction is loaded by a thread; on CUDA its copies run on a stream of their own, so that they
overlap with kernels. It costs the memory of one more block. What is handed out is the same as
without the thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn


class BlockPrefetcher:
    """Hands out blocks by index, loaded by `load(i)`, one ahead of the caller.

    An error of a load made ahead is raised when that block is asked for.
    """

    def __init__(self, load: Callable[[int], nn.Module], count: int, device: torch.device) -> None:
        self._load, self._count = load, count
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load-block")
        self._ahead: tuple[int, Future[nn.Module]] | None = None
        self._last = -1
        self._direction = 1

    def get(self, i: int) -> nn.Module:
        """Block i; each call gives a fresh one."""
        ready, self._ahead = self._ahead, None
        following = self._following(i)
        if ready is not None and ready[0] == i:
            block = self._adopt(ready[1].result())
        else:
            if ready is not None and ready[0] == following:
                self._ahead = ready
            block = self._load(i)
        if self._ahead is None and following is not None:
            self._ahead = following, self._thread.submit(self._load_aside, following)
        return block

    def _following(self, i: int) -> int | None:
        """The block after i in the direction of the last step; a jump goes forward."""
        if i != self._last:
            self._direction = -1 if i == self._last - 1 else 1
            self._last = i
        following = i + self._direction
        return following if 0 <= following < self._count else None

    def _load_aside(self, i: int) -> nn.Module:
        if self._stream is None:
            return self._load(i)
        with torch.cuda.stream(self._stream):
            block = self._load(i)
        self._stream.synchronize()
        return block

    def _adopt(self, block: nn.Module) -> nn.Module:
        """Tell the allocator that the caller's stream uses memory of the loading stream."""
        if self._stream is not None:
            for tensor in [*block.parameters(), *block.buffers()]:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return block

    def close(self) -> None:
        """Drop what is loaded ahead and end the thread."""
        self._ahead = None
        self._thread.shutdown(wait=True, cancel_futures=True)
