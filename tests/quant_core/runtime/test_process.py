import os
import sys

import pytest
import torch

from bitmill.runtime.process import SWITCH_S, settle_process


def test_the_environments_own_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    interval = sys.getswitchinterval()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    try:
        settle_process()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert not torch.backends.cuda.matmul.allow_tf32
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")
        settle_process()
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    finally:
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        sys.setswitchinterval(interval)
        torch.backends.cuda.matmul.allow_tf32 = tf32
