"""A folder of safetensors files, read tensor by tensor and compared with what it should hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.io.safetensors import TensorInfo, safetensors_files


@dataclass(frozen=True)
class TensorFolder:
    """A folder, and the headers of its tensors by name (`io.safetensors.read_headers`)."""

    folder: Path
    headers: dict[str, TensorInfo]

    @cached_property
    def _by_module(self) -> dict[str, list[str]]:
        """Names of the stored tensors of every module."""
        found: dict[str, list[str]] = {}
        for name in self.headers:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    @property
    def file_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.stat().st_size for file in safetensors_files(self.folder))

    def tensor(self, name: str) -> Tensor:
        """A stored tensor by its name, on the CPU. Raises FormatError where it is missing."""
        if name not in self.headers:
            raise FormatError(f"tensor {name} is missing from the checkpoint", param=name)
        path = self.folder / self.headers[name].file
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def check_headers(self, expected: Iterable[TensorInfo]) -> None:
        """Raise FormatError for the first tensor that is missing or of another dtype or shape."""
        for spec in expected:
            found = self.headers.get(spec.name)
            if found is None:
                raise FormatError(
                    f"tensor {spec.name} is missing from the checkpoint", param=spec.name
                )
            if found.dtype != spec.dtype or found.shape != spec.shape:
                raise FormatError(
                    f"tensor {spec.name} is {found.dtype} of shape {found.shape}: "
                    f"the format says {spec.dtype} of shape {spec.shape}",
                    param=spec.name,
                )

    def check_no_others(self, linear: str, expected: set[str]) -> None:
        """Raise FormatError for a tensor of a linear that is neither expected nor its bias."""
        for name in self._by_module.get(linear, ()):
            if name not in expected and name != f"{linear}.bias":
                raise FormatError(f"tensor {name} does not belong to the format", param=name)

    def others(self, linears: Iterable[str]) -> list[TensorInfo]:
        """Tensors that lie under no linear's name, and the linears' biases."""
        known = set(linears)
        return [
            tensor
            for name, tensor in self.headers.items()
            if name.rpartition(".")[0] not in known or name.endswith(".bias")
        ]
