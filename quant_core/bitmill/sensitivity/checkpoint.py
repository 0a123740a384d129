"""Finished blocks of a profile that is being measured, kept so that a killed run can go on.

    block-00012.npz             costs, orders and shapes of block 12's linears
    gradient-0-00012.safetensors  loss gradient [S, T, D] at block 12's input of rank 0's windows,
                                the newest one only

Blocks are measured from the last to the first. The gradient is large, so it is written only when
`GRADIENT_SECONDS` have passed since the last time; a run that goes on passes through blocks between
the saved gradient and the first unmeasured block again, without measuring them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.allocation.profile import FloatArray, IndexArray, LinearProfile
from bitmill.io.atomic import replacing
from bitmill.runtime.ranks import SINGLE, Group

GRADIENT_SECONDS = 20.0


@dataclass(frozen=True, eq=False)
class BlockProfile:
    """One block's part of a profile.

    shapes: linear -> (N, K); costs: linear -> float64 [G, B]; owners: linear -> the linear whose
    order it uses; orders: owner -> int32 [K].
    """

    block: int
    widths: tuple[int, ...]
    shapes: dict[str, tuple[int, int]]
    costs: dict[str, FloatArray]
    owners: dict[str, str]
    orders: dict[str, IndexArray]

    def linear(self, name: str) -> LinearProfile:
        """The profile of one linear."""
        rows, columns = self.shapes[name]
        return LinearProfile(name, rows, columns, self.costs[name], self.owners.get(name))


def joined_profile(parts: Sequence[BlockProfile]) -> BlockProfile:
    """One block's profile from those of its linears."""
    joined = BlockProfile(parts[0].block, parts[0].widths, {}, {}, {}, {})
    for part in parts:
        for name in ("shapes", "costs", "owners", "orders"):
            getattr(joined, name).update(getattr(part, name))
    return joined


class ProfileCheckpoint:
    """The folder of a profile being measured; without a folder nothing is kept.

    Ranks of a group make the same calls; blocks are the first rank's to write and to read.
    """

    def __init__(self, folder: Path | None, group: Group = SINGLE) -> None:
        self._folder, self._group = folder, group
        self._last = time.monotonic()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, block: int) -> BlockProfile | None:
        """A finished block, or None."""
        return self._group.broadcast(self._read(block) if self._group.first else None)

    def _read(self, block: int) -> BlockProfile | None:
        if self._folder is None or not (path := self._block_path(self._folder, block)).exists():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            return BlockProfile(
                block,
                tuple(header["widths"]),
                {name: (rows, columns) for name, rows, columns in header["shapes"]},
                {name: arrays[f"costs/{name}"] for name, _, _ in header["shapes"]},
                header["owners"],
                {owner: arrays[f"order/{owner}"] for owner in header["orders"]},
            )

    def save(self, block: int, profile: BlockProfile) -> None:
        """Keep a finished block."""
        if self._folder is None or not self._group.first:
            return
        header = {
            "widths": profile.widths,
            "shapes": [[name, *shape] for name, shape in profile.shapes.items()],
            "owners": profile.owners,
            "orders": list(profile.orders),
        }
        arrays = {f"costs/{name}": costs for name, costs in profile.costs.items()}
        orders = {f"order/{owner}": order for owner, order in profile.orders.items()}
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        path = self._block_path(self._folder, block)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, header=text, **arrays, **orders)

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
