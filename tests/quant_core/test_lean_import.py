"""What must load without torch does, in a fresh process started in the repository's root."""

from __future__ import annotations

import ast
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
    "bitmill.library.settings",
    "bitmill.library.profiles",
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


def test_editors_are_told_the_same_names() -> None:
    stub = ast.parse(Path(bitmill.__file__).with_suffix(".pyi").read_text())
    told = {
        alias.name: node.module
        for node in ast.walk(stub)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {name: f"bitmill.{module}" for name, module in bitmill._MODULE_OF.items()}


def test_importing_the_package_loads_nothing_but_itself() -> None:
    """Neither its own modules nor other packages, so that it takes no time."""
    code = "import sys; before = {*sys.modules}; import bitmill; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert [name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names] == [
        "bitmill"
    ]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        bitmill.nonsense  # noqa: B018
