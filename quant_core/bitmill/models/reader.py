"""Reading a model folder's tensors one at a time, memory-mapped, in the source's own dtype.

Headers are checked by `bitmill.io.safetensors` before the `safetensors` library opens a
file, so names, dtypes and offsets are known to be sound. A read touches only the bytes it returns.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from bitmill.errors import ModelError
from bitmill.io.safetensors import read_headers
from bitmill.plan.model_plan import PlannedLinear, PlannedTensor, Source

NARROWING_LIMIT = 2.0**-10
"""Largest relative change of a kept matrix that is stored in float16; rounding alone gives less
than 2^-11, so only values beyond float16's range go past it."""


class CheckpointSource:
    """The tensors of a folder of safetensors files, by stored name.

    Files are opened on first use and stay mapped until `close`. Threads may read at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers = read_headers(folder)
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files."""
        self._files.clear()
        self._stack.close()

    def _open(self, name: str) -> Any:
        if name not in self.headers:
            raise ModelError(
                f"{self.folder.name} has no tensor {name!r}; fetch the model again",
                code="missing_tensor",
                param=name,
            )
        file = self.headers[name].file
        with self._lock:
            if file not in self._files:
                handle = safe_open(self.folder / file, framework="pt")
                self._files[file] = self._stack.enter_context(handle)
            return self._files[file]

    def read(self, name: str) -> Tensor:
        """A stored tensor on the CPU, in its own dtype and shape; `ModelError` if unknown."""
        tensor: Tensor = self._open(name).get_tensor(name)
        return tensor

    def read_source(self, source: Source) -> Tensor:
        """The part of a stored tensor that `source` names, [N, K] for a linear's weight."""
        if source.index is None:
            tensor = self.read(source.tensor)
        else:
            window = self._open(source.tensor).get_slice(source.tensor)
            begin, end = source.rows or (0, self.headers[source.tensor].shape[1])
            tensor = window[source.index, begin:end]
        return tensor.T.contiguous() if source.transposed else tensor

    def weight(self, linear: PlannedLinear) -> Tensor:
        """A linear's weight [N, K] in the source's dtype.

        Raises `ModelError` where it holds NaN or infinity.
        """
        weight = self.read_source(linear.source)
        check_finite(linear.name, weight)
        return weight

    def tensor(self, tensor: PlannedTensor) -> Tensor:
        """A kept tensor as it is packed: bit for bit, or narrowed to float16."""
        value = self.read_source(tensor.source)
        return value.half() if tensor.narrowed else value

    def can_narrow(self, tensor: PlannedTensor) -> bool:
        """Whether float16 changes a tensor by at most `NARROWING_LIMIT` of its norm."""
        value = self.read_source(tensor.source)
        error = (value.half().to(value) - value).norm(dtype=torch.float64)
        return bool(error <= NARROWING_LIMIT * value.norm(dtype=torch.float64))


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `ModelError` naming the tensor and its first row with NaN or infinity.

    A finite sum proves that all values are finite, in one pass and without a copy; only where it
    is not (or overflowed) are values looked at one by one.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if torch.isfinite(total):
        return
    bad = (~torch.isfinite(tensor)).reshape(len(tensor) if tensor.dim() else 1, -1).any(1)
    rows = bad.nonzero().flatten()
    if len(rows):
        raise ModelError(
            f"{name} has NaN or infinite values in {len(rows)} of {len(bad)} rows "
            f"(first: row {int(rows[0])}); the model's weights are damaged",
            code="non_finite_weights",
            param=name,
        )


def finite(source: CheckpointSource, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of the source, each checked for NaN and infinity."""
    for name in names:
        tensor = source.read(name)
        check_finite(name, tensor)
        yield name, tensor
