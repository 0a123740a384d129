"""Triton's hash of itself is there before the first launch, and nothing depends on it."""

import sys

import pytest
import torch

from bitmill.runtime.warm_up import warm_up


def test_tritons_hash_is_made_in_a_thread():
    key = pytest.importorskip("triton.runtime.cache").triton_key
    key.cache_clear()
    thread = warm_up(torch.device("cuda"))
    assert thread is not None
    assert thread.daemon
    thread.join()
    assert key.cache_info().currsize == 1


def test_a_process_without_triton_says_nothing(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    thread = warm_up(torch.device("cuda"))
    assert thread is not None
    thread.join()
    assert capfd.readouterr() == ("", "")


def test_a_cpu_needs_no_warming():
    assert warm_up(torch.device("cpu")) is None
