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
    "bitmill.config.quantization",
    "bitmill.config.bit_width_map",
    "bitmill.errors",
    "bitmill.runtime.launch",
    "bitmill.plan.model_plan",
    "bitmill.allocation.allocator",
    "bitmill.io.manifest",
    "bitmill.reporting.html",
    "bitmill.formats.accounting",
    "bitmill.formats.format",
    "bitmill.formats.packed.config",
    "bitmill.formats.packed.format",
    "bitmill.config.slim_llm",
    "bitmill.formats.packed.layout",
)


IMPORT_ALL = """
import importlib, sys
heavy, modules = sys.argv[1].split(), sys.argv[2:]
for module in modules:
    importlib.import_module(module)
    print(module, *(name for name in heavy if name in sys.modules))
"""


def test_importing_loads_no_tensor_library() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, " ".join(HEAVY), *LEAN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == list(LEAN)


def test_every_public_name_resolves() -> None:
    assert sorted(bitmill.__all__) == sorted({*bitmill._MODULE_OF, "__version__"})
    for name in bitmill.__all__:
        assert getattr(bitmill, name) is not None, name
    assert dir(bitmill) == sorted(bitmill.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        bitmill.nonsense  # noqa: B018
