"""Replayed launches give what launching gives, beside threads that use the device too."""

import threading

import pytest
import torch

from bitmill.runtime import graphs as device_graphs
from bitmill.runtime.graphs import graphs_kept, replayed

CALLS = []


def scaled(factor, x, y):
    """Uses x up."""
    CALLS.append(factor)
    x *= factor
    return x @ y, x + 1


def given(seed, device, size=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, size, generator=generator).to(device) for _ in range(2)]


def test_without_a_graph_the_function_is_called():
    x, y = given(0, "cpu")
    expected = (2 * x) @ y
    with graphs_kept(torch.device("cpu")):
        product, _ = replayed(scaled, (2.0,), (x, y))
    assert torch.equal(product, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_the_second_call_on_a_graph_is_replayed(monkeypatch):
    device = torch.device("cuda")
    stop = threading.Event()

    def use_the_device():
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                torch.randn(1 << 20).pin_memory().to(device, non_blocking=True).sum().item()

    thread = threading.Thread(target=use_the_device)
    thread.start()
    try:
        CALLS.clear()
        with graphs_kept(device):
            results = [replayed(scaled, (2.0,), given(seed, device)) for seed in range(5)]
            assert CALLS == [2.0, 2.0]
            replayed(scaled, (3.0,), given(0, device))
            replayed(scaled, (2.0,), given(0, device, size=16))
            assert CALLS == [2.0, 2.0, 3.0, 2.0]
            monkeypatch.setattr(device_graphs, "spare_device_bytes", lambda _: 0)
            for seed in range(3):
                replayed(scaled, (5.0,), given(seed, device))
            assert CALLS[4:] == [5.0] * 3
        for seed, result in enumerate(results):
            for found, expected in zip(result, scaled(2.0, *given(seed, device)), strict=True):
                assert torch.equal(found, expected)
    finally:
        stop.set()
        thread.join()
