"""Where published files live. An attempt writes below its own prefix `<job id>/<token>/`.

Files become visible only when their rows are inserted in the transaction that makes the job
succeed; prefixes that no row names are garbage. Keys come from the database, never from a client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from bitmill_workers.store.records import Artifact

PROFILES = "profiles"
UPLOADS = "uploads"
STAGES = "stages"
"""Kinds of shared folders: sensitivity profiles, what clients have sent, stages of sweeps."""


class ArtifactStore(Protocol):
    """Storage of published files."""

    def prepare(self) -> None:
        """Create what must exist before the first attempt; repeating it changes nothing."""

    def check(self) -> None:
        """Raise `StorageUnavailable` where files elsewhere cannot be reached; takes seconds at most
        and may be called often."""

    def attempt_folder(self, job_id: str, token: int) -> Path:
        """Local folder that the runner fills; the same on every call."""

    def publish(
        self, job_id: str, token: int, on_bytes: Callable[[int, int], None]
    ) -> list[Artifact]:
        """Store the attempt's files; `on_bytes(done, total)` is told about progress."""

    def local_path(self, artifact: Artifact) -> Path | None:
        """The file itself where it is on this machine."""

    def url(self, artifact: Artifact) -> str | None:
        """A time-limited download address where the file is elsewhere."""

    def read(self, artifact: Artifact) -> bytes:
        """The whole content of a small file."""

    def read_part(self, artifact: Artifact, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, fewer at its end."""

    def fetch(self, artifact: Artifact, target: Path) -> None:
        """Put a file, which may be large, at a local path that does not exist yet."""

    def attempts(self) -> Iterator[tuple[str, int]]:
        """Job id and token of every stored attempt, published or not."""

    def remove(self, job_id: str, token: int) -> None:
        """Delete an attempt's files; nothing happens where there are none."""

    def drop_local(self, job_id: str, token: int) -> None:
        """The attempt's files are visible: free what this machine need not keep of them."""

    def share_folder(self, kind: str, name: str, folder: Path) -> None:
        """Make a folder that came to be on this machine reachable for every process."""

    def fetch_folder(self, kind: str, name: str, folder: Path) -> bool:
        """Fill `folder` with one made elsewhere; False where there is none."""

    def shared_files(self, kind: str, name: str, folder: Path) -> dict[str, int]:
        """Paths and bytes of the files that every process can reach; `folder` is the local one."""

    def remove_folder(self, kind: str, name: str) -> None:
        """Delete what other processes could reach; local folders are the caller's."""

    def stop(self) -> None:
        """Whoever waits for files elsewhere, now or later, gets `StorageUnavailable` at once."""
