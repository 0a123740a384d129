"""A folder of safetensors files, read tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from safetensors import safe_open
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.formats.headers import HeaderFolder


@dataclass(frozen=True)
class TensorFolder(HeaderFolder):
    """A folder whose tensors are read on demand, each file opened once.

    Opening one parses all of its header, which takes longer than reading most tensors.
    """

    _files: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def tensor(self, name: str) -> Tensor:
        """A stored tensor by its name, on the CPU. Raises FormatError where it is missing."""
        if name not in self.headers:
            raise FormatError(f"tensor {name} is missing from the checkpoint", param=name)
        file = self.headers[name].file
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        tensor: Tensor = self._files[file].get_tensor(name)
        return tensor
