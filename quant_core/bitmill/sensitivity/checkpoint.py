"""Finished blocks of a profile that is being measured, kept so that a killed run can go on.

    block-00012.npz               block 12's part of the profile, a profile itself
    gradient-0-00012.safetensors  loss gradient [S, T, D] at block 12's input of rank 0's windows,
                                the newest one only

Blocks are measured from the last to the first. The gradient is large, so it is written only when
`GRADIENT_SECONDS` have passed since the last time; a run that goes on passes through blocks between
the saved gradient and the first unmeasured block again, without measuring them.
"""

from __future__ import annotations

import time
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.allocation.profile import SensitivityProfile
from bitmill.io.atomic import replacing
from bitmill.runtime.ranks import SINGLE, Ranks

GRADIENT_SECONDS = 20.0


class ProfileCheckpoint:
    """The folder of a profile being measured; without a folder nothing is kept.

    Ranks of a group make the same calls; blocks are the first rank's to write and to read.
    """

    def __init__(self, folder: Path | None, group: Ranks = SINGLE) -> None:
        self._folder, self._group = folder, group
        self._last = time.monotonic()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, block: int) -> SensitivityProfile | None:
        """A finished block, or None."""
        return self._group.broadcast(self._read(block) if self._group.first else None)

    def _read(self, block: int) -> SensitivityProfile | None:
        if self._folder is None or not (path := self._block_path(self._folder, block)).is_file():
            return None
        return SensitivityProfile.load(path)

    def save(self, block: int, profile: SensitivityProfile) -> None:
        """Keep a finished block."""
        if self._folder is not None and self._group.first:
            profile.save(self._block_path(self._folder, block))

    def save_gradient(self, block: int, gradient: Tensor) -> None:
        """Keep the gradient at a block's input, if enough time has passed."""
        due = time.monotonic() - self._last >= GRADIENT_SECONDS
        if self._folder is None or not block or not self._group.broadcast(due):
            return
        older = self._gradients()
        name = f"gradient-{self._group.rank}-{block:05}.safetensors"
        with replacing(self._folder / name) as temporary:
            save_file({"gradient": gradient}, temporary)
        self._group.barrier()
        for path in older.values():
            path.unlink()
        self._last = time.monotonic()

    def drop_gradients(self) -> None:
        """Remove what only an unfinished measurement needs."""
        for path in self._gradients().values():
            path.unlink()

    def gradient(self) -> tuple[int, Tensor] | None:
        """The newest saved gradient and the block at whose input it holds, or None."""
        saved = self._gradients()
        everywhere = set.intersection(*self._group.gather(set(saved)))
        if not everywhere:
            return None
        block = min(everywhere)
        return block, load_file(saved[block])["gradient"].clone()

    def _gradients(self) -> dict[int, Path]:
        pattern = f"gradient-{self._group.rank}-*.safetensors"
        found = self._folder.glob(pattern) if self._folder else ()
        return {int(path.stem.rpartition("-")[2]): path for path in found}

    @staticmethod
    def _block_path(folder: Path, block: int) -> Path:
        return folder / f"block-{block:05}.npz"
