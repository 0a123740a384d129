"""The files of a finished checkpoint folder, as its manifest lists them."""

from __future__ import annotations

from pathlib import Path

from bitmill.errors import FormatError, VerificationError
from bitmill.io.atomic import sha256_file
from bitmill.io.manifest import MANIFEST_NAME, SUMS_NAME, read_manifest


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
