"""Weights of tokens that the backward pass of a profile leaves for refinement, block by block.

    key.json                   what the weights follow from, and their power of gradients
    block-00012.safetensors    f32 [S, T] by the first of linears that read one input

Both passes go over the same windows in the same batches, so the weights are those that refinement
would find. A job that takes a profile from elsewhere has none of them, and passes itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from bitmill.calibration.token_weights import POWER
from bitmill.io.atomic import read_json, write_bytes, write_json

KEY_NAME = "key.json"


@dataclass(frozen=True)
class KeptWeights:
    """key: digest of model, windows and machine. What lies in the folder under another key counts
    for nothing."""

    folder: Path
    key: str

    def save(self, block: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights of a block."""
        if not self._is_ours():
            self.remove()
            self.folder.mkdir(parents=True)
            write_json(self.folder / KEY_NAME, self._named)
        write_bytes(self._path(block), safetensors.torch.save(dict(weights)))

    def has(self, block: int) -> bool:
        """Whether those of a block are there."""
        return self._is_ours() and self._path(block).is_file()

    def load(self, blocks: int) -> dict[str, Tensor] | None:
        """Those of all blocks, or None where some are missing."""
        if not all(self.has(block) for block in range(blocks)):
            return None
        files = [safetensors.torch.load_file(self._path(block)) for block in range(blocks)]
        return {name: weight for one in files for name, weight in one.items()}

    def remove(self) -> None:
        """Drop them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_ours(self) -> bool:
        path = self.folder / KEY_NAME
        return path.is_file() and read_json(path) == self._named

    @property
    def _named(self) -> dict[str, str | float]:
        return {"key": self.key, "power": POWER}

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:05}.safetensors"
