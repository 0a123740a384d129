"""The list of a published folder's files with their sizes and SHA-256. Torch-free.

MANIFEST.json lists every file but itself and SHA256SUMS; SHA256SUMS lists every file but itself
in the form that `sha256sum --check` reads, MANIFEST.json included. A folder that was copied or
downloaded is checked against the manifest: nothing missing, nothing added, nothing changed.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bitmill.errors import FormatError, VerificationError, reason
from bitmill.io.atomic import sha256_file, write_bytes

MANIFEST_NAME = "MANIFEST.json"
SUMS_NAME = "SHA256SUMS"


class FileEntry(BaseModel):
    """Size in bytes and hex SHA-256 of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """Files of a folder by their path relative to it, with forward slashes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _plain_paths(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in files:
            parts = PurePosixPath(path).parts
            plain = "/".join(parts) == path and not path.startswith("/") and path.isprintable()
            if not parts or not plain or ".." in parts or "\\" in path:
                raise ValueError(f"path {path!r} is not a plain relative path")
        return files

    @property
    def total_bytes(self) -> int:
        """Size of all listed files."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> str:
        """JSON text: two spaces of indent, paths in order."""
        return self.model_dump_json(indent=2) + "\n"


def write_manifest(folder: Path) -> Manifest:
    """Write MANIFEST.json and SHA256SUMS for the files in `folder`; existing ones are replaced."""
    files = {
        path: FileEntry(size=file.stat().st_size, sha256=sha256_file(file))
        for path, file in _files(folder).items()
    }
    manifest = Manifest(files=files)
    write_bytes(folder / MANIFEST_NAME, manifest.to_json().encode())
    sums = {path: entry.sha256 for path, entry in files.items()}
    sums[MANIFEST_NAME] = sha256_file(folder / MANIFEST_NAME)
    lines = [f"{sums[path]}  {path}\n" for path in sorted(sums)]
    write_bytes(folder / SUMS_NAME, "".join(lines).encode())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read MANIFEST.json. Raises FormatError where it is missing or damaged."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{MANIFEST_NAME} cannot be read: {reason(error)}", param=MANIFEST_NAME
        ) from error


def check_folder(folder: Path) -> Manifest:
    """Compare every file with the manifest, byte for byte, and return the manifest.

    Raises VerificationError naming the first file that is missing, added or changed.
    """
    manifest = read_manifest(folder)
    found = _files(folder)
    for path in sorted(manifest.files.keys() - found.keys()):
        raise _mismatch(path, "is missing")
    for path in sorted(found.keys() - manifest.files.keys()):
        raise _mismatch(path, f"is not in {MANIFEST_NAME}")
    for path, entry in manifest.files.items():
        size = found[path].stat().st_size
        if size != entry.size:
            raise _mismatch(path, f"has {size} bytes, {MANIFEST_NAME} says {entry.size}")
        if sha256_file(found[path]) != entry.sha256:
            raise _mismatch(path, "has another SHA-256 than when it was published")
    return manifest


def _files(folder: Path) -> dict[str, Path]:
    """Regular files below `folder` by relative path, in order, without the two lists."""
    found = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if file.is_symlink():
            raise _mismatch(path, "is a symbolic link; a published folder holds plain files only")
        if file.is_file() and path not in (MANIFEST_NAME, SUMS_NAME):
            found[path] = file
    return found


def _mismatch(path: str, problem: str) -> VerificationError:
    return VerificationError(
        f"file {path} {problem}: fetch it again", code="checksum_mismatch", param=path
    )
