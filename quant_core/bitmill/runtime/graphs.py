"""Launches that are the same for every block, captured once as a CUDA graph and replayed.

Where kernels are short, launching one from Python takes longer than running it. `replayed` calls a
function the first time it meets its arguments' shapes, captures it the second time, and from then
on copies the arguments to the captured ones, replays, and returns copies of the captured results:
the same kernels on the same values. Captured tensors hold memory until `graphs_kept` ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from bitmill.runtime.memory import spare_device_bytes

MOST_BYTES = 6 << 30
"""Arguments and results of all graphs. What they compute with beside is shared."""

Launches = Callable[..., Sequence[Tensor]]
"""Takes hashable values, then tensors, which it may change; its launches follow from the former and
the latter's shapes, it never waits for the device, and its results are tensors of its own."""


class _Graph:
    """A captured call."""

    def __init__(self, graph: torch.cuda.CUDAGraph, given: list[Tensor], made: Sequence[Tensor]):
        self._graph, self._given, self._made = graph, given, made

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        for place, tensor in zip(self._given, tensors, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return [tensor.clone() for tensor in self._made]


class Graphs:
    """The graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._left = device, MOST_BYTES
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._known: dict[Hashable, Callable[..., Sequence[Tensor]] | None] = {}

    def call(
        self, function: Launches, fixed: Sequence[Hashable], tensors: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """`replayed` on this device."""
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        key = (function, *fixed, shapes)
        if key not in self._known:
            size = 2 * sum(tensor.nbytes for tensor in tensors)
            if size <= min(self._left, spare_device_bytes(self._device)):
                self._known[key] = None
                self._left -= size
            return function(*fixed, *tensors)
        run = self._known[key]
        if run is None:
            try:
                run = self._capture(function, fixed, tensors)
            except RuntimeError:  # what cannot be captured here is launched
                run = partial(function, *fixed)
            self._known[key] = run
        return run(*tensors)

    def _capture(
        self, function: Launches, fixed: Sequence[Hashable], tensors: Sequence[Tensor]
    ) -> _Graph:
        """Other threads go on meanwhile, with launches and memory of their own."""
        given = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                made = function(*fixed, *given)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return _Graph(graph, given, made)


_active: Graphs | None = None


@contextmanager
def graphs_kept(device: torch.device) -> Iterator[None]:
    """Within it `replayed` captures graphs on a CUDA device."""
    global _active
    before = _active
    _active = Graphs(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        if _active is not None:
            torch.cuda.synchronize(device)
        _active = before


def replayed(
    function: Launches, fixed: Sequence[Hashable], tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """function(*fixed, *tensors), by a graph where one is kept; see `Launches`."""
    if _active is None:
        return function(*fixed, *tensors)
    return _active.call(function, fixed, tensors)
