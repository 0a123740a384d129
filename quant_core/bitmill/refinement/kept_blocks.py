"""Refined blocks that a search for the map leaves for stage `refine`, if its map is that one.

key.json    what the blocks follow from; written last by who keeps, removed last by who takes
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from bitmill.io.atomic import read_json, write_json

KEY_NAME = "key.json"


@dataclass(frozen=True)
class KeptBlocks:
    """A folder of refined blocks, of one map at a time."""

    folder: Path

    def keep(self, blocks: Path, key: str) -> None:
        """Put a finished folder of `refine_model` in the place of what was kept before."""
        self.remove()
        shutil.move(blocks, self.folder)  # a shared stage may lie on another file system
        write_json(self.folder / KEY_NAME, key)

    def take(self, key: str, target: Path) -> bool:
        """Move blocks of this key into a folder; whether they were there. Goes on where it was
        killed; where that folder was emptied since, the blocks moved before are missing."""
        path = self.folder / KEY_NAME
        if not path.is_file() or read_json(path) != key:
            return False
        for entry in sorted(self.folder.iterdir()):
            if entry != path:
                shutil.move(entry, target / entry.name)
        self.remove()
        return True

    def remove(self) -> None:
        """Drop what is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
