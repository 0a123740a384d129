"""Weights of tokens and rows that a profile's backward pass leaves for refinement, block by block.

    key.json                   what the weights follow from, and their power of gradients
    block-00012.safetensors    those of a block (`LossWeights.tensors`)

Both passes go over the same windows in the same batches, so the weights are those that refinement
would find. A job that takes a profile from elsewhere has none of them, and passes itself.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from bitmill.calibration.loss_weights import POWER, LossWeights
from bitmill.io.atomic import read_json, write_bytes, write_json

KEY_NAME = "key.json"


@dataclass(frozen=True)
class KeptWeights:
    """key: digest of model, windows and machine. What lies in the folder under another key counts
    for nothing."""

    folder: Path
    key: str

    def save(self, block: int, weights: LossWeights) -> None:
        """Keep the weights of a block."""
        if not self._is_ours():
            self.remove()
            self.folder.mkdir(parents=True)
            write_json(self.folder / KEY_NAME, self._named)
        write_bytes(self._path(block), safetensors.torch.save(weights.tensors()))

    def has(self, block: int) -> bool:
        """Whether those of a block are there."""
        return self._is_ours() and self._path(block).is_file()

    def load(self, blocks: int) -> LossWeights | None:
        """Those of all blocks, or None where some are missing."""
        if not all(self.has(block) for block in range(blocks)):
            return None
        files = [safetensors.torch.load_file(self._path(block)) for block in range(blocks)]
        return LossWeights.of_tensors({name: t for one in files for name, t in one.items()})

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
