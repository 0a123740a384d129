import pytest
import torch

from bitmill_kernels.backend import resolve_backend

CPU = torch.device("cpu")


def test_cpu_takes_the_plain_versions(monkeypatch):
    monkeypatch.delenv("BITMILL_BACKEND", raising=False)
    assert resolve_backend("auto", CPU) == "reference"


def test_the_environment_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("BITMILL_BACKEND", "nonsense")
    assert resolve_backend("reference", CPU) == "reference"
    with pytest.raises(ValueError, match="'nonsense' is unknown"):
        resolve_backend("auto", CPU)


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run on device cpu"):
        resolve_backend("triton", CPU)
