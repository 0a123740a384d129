"""A graph of one call that may turn out to be no call for a graph.

Where a capture fails within `torch.cuda.graph`, the stream stays the current one and torch goes on
expecting the graph's memory and random numbers. Here the driver captures, on a stream that is used
for nothing else, and torch knows nothing of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

ANY_THREAD = 0
"""CU_STREAM_CAPTURE_MODE_GLOBAL, as `torch.cuda.graph` has it."""


def replayed(call: Callable[[], Tensor]) -> Tensor:
    """What a graph of the call writes, NaN where the graph leaves the call's work out.

    The call runs once before. Raises what it raises, or RuntimeError with the driver's reason.
    """
    driver, stream = ctypes.CDLL("libcuda.so.1"), _stream()
    place, graph, program = (ctypes.c_void_p(at) for at in (stream.cuda_stream, None, None))

    def check(error: int) -> None:
        if error:
            text = ctypes.c_char_p()
            driver.cuGetErrorString(error, ctypes.byref(text))
            raise RuntimeError(f"in a CUDA graph: {(text.value or b'').decode()} ({error})")

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        check(driver.cuStreamBeginCapture_v2(place, ANY_THREAD))
        try:
            y = call()
        finally:
            ended = driver.cuStreamEndCapture(place, ctypes.byref(graph))
        check(ended)
        torch.cuda.synchronize()  # what the call did elsewhere must not come after the fill
        y.fill_(torch.nan)
        check(
            driver.cuGraphInstantiateWithFlags(ctypes.byref(program), graph, ctypes.c_ulonglong())
        )
        check(driver.cuGraphLaunch(program, place))
        stream.synchronize()
        check(driver.cuGraphExecDestroy(program))
        check(driver.cuGraphDestroy(graph))
    return y


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()
