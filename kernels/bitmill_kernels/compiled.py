"""C++ and CUDA sources compiled once a machine, through torch's extension loader.

torch keeps others out of a build by a plain file named `lock` (`FileBaton`, torch 2.13). A process
that is killed while it compiles leaves it behind, and all later ones wait for it forever. Here a
lock of the operating system, which ends with its holder, stands around the build: who holds it may
remove a file that is still there. A finished build is marked, and loaded without any lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_DONE = "done"

VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""Compiler flags by what torch finds the processor capable of, not "native": the folder of compiled
kernels may be shared by unlike machines, so each capability has its own build."""


VECTORS = Path(__file__).with_name("vectors.h")
"""What sources of kernels for CPUs include."""


def vector_flags() -> tuple[str, ...]:
    """Those of this processor."""
    return VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())


def compiled(
    name: str, sources: Sequence[Path], *, headers: Sequence[Path] = (), **options: Any
) -> Path:
    """The shared library `name` of these sources; options as `torch.utils.cpp_extension.load`.

    headers: files that the sources include.

    Builds lie below TORCH_EXTENSIONS_DIR, or torch's own cache, apart by sources, options and
    torch. Raises RuntimeError, OSError or CalledProcessError where it cannot be compiled.
    """
    from torch.utils.cpp_extension import get_default_build_root, load

    digest = hashlib.sha256(f"{torch.__version__} {sorted(options.items())}".encode())
    for source in (*sources, *headers):
        digest.update(source.read_bytes())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    # torch renames the second of one name in a process (findings/torch-renames-a-second-build.sh).
    name = f"{name}_{digest.hexdigest()[:12]}"
    folder = root / name
    library = folder / f"{name}.so"
    if (folder / _DONE).exists() and library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        load(
            name,
            [str(source) for source in sources],
            build_directory=str(folder),
            is_python_module=False,
            **options,
        )
        (folder / _DONE).touch()
    return library
