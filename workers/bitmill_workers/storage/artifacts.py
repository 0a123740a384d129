"""Where published files live. An attempt writes below its own prefix `<job id>/<token>/`.

Files become visible only when their rows are inserted in the transaction that makes the job
succeed; prefixes that no row names are garbage. Keys come from the database, never from a client.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from bitmill.errors import FormatError, VerificationError
from bitmill.io.atomic import sha256_file
from bitmill.io.manifest import MANIFEST_NAME, SUMS_NAME, read_manifest
from bitmill_workers.settings import Settings
from bitmill_workers.store.records import Artifact


class ArtifactStore(Protocol):
    """Storage of published files."""

    def prepare(self) -> None:
        """Create what must exist before the first attempt; repeating it changes nothing."""

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

    def fetch(self, artifact: Artifact, target: Path) -> None:
        """Put a file, which may be large, at a local path that does not exist yet."""

    def attempts(self) -> Iterator[tuple[str, int]]:
        """Job id and token of every stored attempt, published or not."""

    def remove(self, job_id: str, token: int) -> None:
        """Delete an attempt's files; nothing happens where there are none."""

    def drop_local(self, job_id: str, token: int) -> None:
        """The attempt's files are visible: free what this machine need not keep of them."""

    def share_profile(self, profile_id: str, folder: Path) -> None:
        """Make a profile that this machine made reachable for every process."""

    def fetch_profile(self, profile_id: str, folder: Path) -> bool:
        """Fill `folder` with a profile made elsewhere; False where there is none."""


def listed_files(folder: Path) -> list[tuple[str, int, str]]:
    """Path, size and SHA-256 of every file of a finished checkpoint folder.

    Hashes come from its manifest. Raises `VerificationError` (code `incomplete_output`) where
    there is none, or a listed file is missing or has another size.
    """
    try:
        manifest = read_manifest(folder)
    except FormatError as error:
        raise VerificationError(
            f"the runner left no whole output: {error.message}", code="incomplete_output"
        ) from error
    found = [(path, entry.size, entry.sha256) for path, entry in manifest.files.items()]
    for path, size, _ in found:
        file = folder / path
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            raise VerificationError(
                f"{path} has {actual} bytes, the manifest says {size}", code="incomplete_output"
            )
    for name in (MANIFEST_NAME, SUMS_NAME):
        file = folder / name
        if file.is_file():
            found.append((name, file.stat().st_size, sha256_file(file)))
    return found


class LocalArtifacts:
    """A folder on this machine (or a shared mount)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Create the folder."""
        self.root.mkdir(parents=True, exist_ok=True)

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

    def share_profile(self, profile_id: str, folder: Path) -> None:
        """Nothing: processes share the folder."""

    def fetch_profile(self, profile_id: str, folder: Path) -> bool:
        """True where the profile is there."""
        return folder.is_dir()


def open_artifacts(settings: Settings) -> ArtifactStore:
    """The artifact store that the settings name."""
    if settings.s3_bucket is None:
        return LocalArtifacts(settings.artifacts_folder)
    from bitmill_workers.storage.s3 import S3Artifacts

    return S3Artifacts(settings)
