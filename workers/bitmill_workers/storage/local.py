"""Published files in a folder on this machine, or on a shared mount."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bitmill_workers.storage.listing import listed_files
from bitmill_workers.store.records import Artifact


class LocalArtifacts:
    """A folder on this machine (or a shared mount)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Create the folder."""
        self.root.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Nothing is elsewhere."""

    def attempt_folder(self, job_id: str, token: int) -> Path:
        """`<root>/<job id>/<token>`; the runner's output is already in its final place."""
        return self.root / job_id / str(token)

    def publish(
        self, job_id: str, token: int, on_bytes: Callable[[int, int], None]
    ) -> list[Artifact]:
        """Check that the files are whole."""
        files = listed_files(self.attempt_folder(job_id, token))
        total = sum(size for _, size, _ in files)
        on_bytes(total, total)
        return [
            Artifact(path, size, sha256, f"{job_id}/{token}/{path}") for path, size, sha256 in files
        ]

    def local_path(self, artifact: Artifact) -> Path | None:
        """The file below the root."""
        return self.root / artifact.storage_key

    def url(self, artifact: Artifact) -> str | None:
        """None: the API serves the file itself."""
        return None

    def read(self, artifact: Artifact) -> bytes:
        """The file's content."""
        return (self.root / artifact.storage_key).read_bytes()

    def read_part(self, artifact: Artifact, start: int, end: int) -> bytes:
        """A part of the file's content."""
        with (self.root / artifact.storage_key).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def fetch(self, artifact: Artifact, target: Path) -> None:
        """Link the file, or copy it to another file system."""
        place = self.root / artifact.storage_key
        try:
            os.link(place, target)
        except OSError:
            shutil.copyfile(place, target)

    def attempts(self) -> Iterator[tuple[str, int]]:
        """All `<job id>/<token>` folders."""
        for folder in sorted(self.root.glob("*/*")):
            if folder.name.isdigit():
                yield folder.parent.name, int(folder.name)

    def remove(self, job_id: str, token: int) -> None:
        """Delete the attempt's folder, and the job's when it was the last."""
        shutil.rmtree(self.attempt_folder(job_id, token), ignore_errors=True)
        parent = self.root / job_id
        if parent.is_dir() and not any(parent.iterdir()):
            shutil.rmtree(parent, ignore_errors=True)

    def drop_local(self, job_id: str, token: int) -> None:
        """Nothing: the local files are the published ones."""

    def share_folder(self, kind: str, name: str, folder: Path) -> None:
        """Nothing: processes share the folder."""

    def fetch_folder(self, kind: str, name: str, folder: Path) -> bool:
        """True where the folder is there."""
        return folder.is_dir()

    def shared_files(self, kind: str, name: str, folder: Path) -> dict[str, int]:
        """The files of the local folder."""
        files = [place for place in folder.rglob("*") if place.is_file()]
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}

    def remove_folder(self, kind: str, name: str) -> None:
        """Nothing: the local folder is the only one."""

    def stop(self) -> None:
        """Nothing is elsewhere."""
