"""Stand-ins for packages that SGLang imports and that exist for CUDA alone.

`env` beside this file puts it into an environment as `sitecustomize`, which Python imports first.
torchvision, torchaudio and sglang-kernel (`sgl_kernel`) are built for CUDA on PyPI. A text model on
a CPU, with `--attention-backend torch_native`, calls nothing of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMES = ("sgl_kernel", "torchaudio", "torchvision")


class _Any(type):
    """A class that has every attribute, each such a class."""

    def __getattr__(cls, name: str) -> _Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Any(name, (), {})


class _Empty(ModuleType):
    """Has every name."""

    __path__: Sequence[str] = ()
    __getattr__ = _Any.__getattr__


class _StandIns(MetaPathFinder, Loader):
    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name.partition(".")[0] in NAMES:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_StandIns())
