"""Libraries of other projects' CUDA kernels, which know neither torch nor Python.

Sources are compiled by nvcc as they lie in a package's folder, which is on the path and of which
nothing is imported, together with a `.cu` of C functions here. What they include of torch is
written beside them: headers of `torch_stand_in.h`, or a peer's own. Such a library runs with any
torch of its CUDA version; where it lies may be said in a variable, else a process compiles it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch

ARCHITECTURE = "sm_90"
OF_TORCH = (
    "ATen/ATen.h",
    "ATen/DeviceGuard.h",
    "ATen/Tensor.h",
    "ATen/cuda/CUDAContext.h",
    "c10/cuda/CUDAGuard.h",
    "c10/util/Exception.h",
    "cublas_v2.h",
    "pybind11/pybind11.h",
    "torch/library.h",
    "torch/types.h",
)
STAND_IN = dict.fromkeys(OF_TORCH, '#include "torch_stand_in.h"\n')
"""Headers by name."""


def available(variable: str, package: str) -> bool:
    """Whether a library or the sources of one are named."""
    return variable in os.environ or find_spec(package) is not None


def folder_of(package: str, advice: str) -> Path:
    """Where the package lies; raises RuntimeError with the advice where it is not on the path."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{package} is not on the path: {advice}")
    return Path(spec.submodule_search_locations[0])


def compiled(
    library: Path,
    sources: Sequence[Path],
    headers: Mapping[str, str],
    flags: Sequence[str],
) -> Path:
    """One library of all sources, each in a process; raises RuntimeError with what nvcc said."""
    with tempfile.TemporaryDirectory() as made:
        for name, text in headers.items():
            Path(made, name).parent.mkdir(parents=True, exist_ok=True)
            Path(made, name).write_text(text)
        common = ["-O3", "-std=c++17", f"-arch={ARCHITECTURE}", "-Xcompiler", "-fPIC"]
        common += [f"-I{made}", f"-I{Path(__file__).parent}", *flags]

        def one(source: Path) -> str:
            out = str(Path(made, source.name).with_suffix(".o"))
            _nvcc(["-c", *common, str(source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(one, sources))
        # What the stand-in defines under torch's names stays the library's own.
        _nvcc(["-shared", "-Xlinker", "-Bsymbolic", *objects, "-o", str(library)])
    return library


def _nvcc(arguments: Sequence[str]) -> None:
    done = subprocess.run(["nvcc", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}{done.stderr}\nby nvcc {' '.join(arguments)}")


def loaded(variable: str, build: Callable[[Path], Path]) -> ctypes.CDLL:
    """The library that the variable names, or one built; raises RuntimeError or OSError."""
    place = os.environ.get(variable)
    return ctypes.CDLL(place or str(build(Path(tempfile.mkdtemp(), "peer.so"))))


def check(said: bytes | None) -> None:
    """Raise RuntimeError with what a function of `torch_stand_in.h` gave, if anything."""
    if said:
        raise RuntimeError(said.decode())


def stream() -> int:
    """The current stream."""
    current: int = torch.cuda.current_stream().cuda_stream
    return current
