"""What must load without torch does, in a fresh process started in the repository's root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bitmill

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "triton", "safetensors")
LEAN = (
    "bitmill",
    "bitmill.spec",
    "bitmill.bits",
    "bitmill.errors",
    "bitmill.plan",
    "bitmill.allocate",
    "bitmill.manifest",
    "bitmill.packed_config",
    "bitmill.slim_maps",
    "bitmill.stored_tensors",
)


@pytest.mark.parametrize("module", LEAN)
def test_import_loads_no_tensor_library(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    assert sorted(bitmill.__all__) == sorted({*bitmill._MODULE_OF, "__version__"})
    for name in bitmill.__all__:
        assert getattr(bitmill, name) is not None, name
    assert dir(bitmill) == sorted(bitmill.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        bitmill.nonsense  # noqa: B018
