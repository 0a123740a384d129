"""A folder of safetensors files, read tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

from safetensors import safe_open
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.formats.headers import HeaderFolder


@dataclass(frozen=True)
class TensorFolder(HeaderFolder):
    """A folder whose tensors are read on demand."""

    def tensor(self, name: str) -> Tensor:
        """A stored tensor by its name, on the CPU. Raises FormatError where it is missing."""
        if name not in self.headers:
            raise FormatError(f"tensor {name} is missing from the checkpoint", param=name)
        path = self.folder / self.headers[name].file
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
