"""The bytes of uploads: `<data>/uploads/<id>.open/` while parts come, `<id>/` once checked.

Parts are written where they belong in the file, after their digest was compared, so nothing is
copied when the last one has come. Other machines get a complete upload through the artifact store.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from bitmill.errors import ModelError
from bitmill.io import bounded_json
from bitmill.io.atomic import disk_errors, sha256_file
from bitmill.io.gguf import read_gguf_header
from bitmill.io.safetensors import read_header
from bitmill_workers.settings import Settings
from bitmill_workers.storage.artifacts import UPLOADS, ArtifactStore
from bitmill_workers.store.uploads import PART_BYTES, UploadFile, UploadRecord, UploadStore

_MAX_JSON = 64 << 20
_MAX_JSON_MARKS = 4_000_000


class UploadFolder:
    """Where one upload's files lie on this machine."""

    def __init__(self, settings: Settings, upload_id: str) -> None:
        self.whole = settings.uploads_folder / upload_id
        self.open = settings.uploads_folder / f"{upload_id}.open"

    def scratch(self) -> Path:
        """A new file for the bytes of a part, on the same file system."""
        self.open.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(prefix=".part-", dir=self.open)
        os.close(handle)
        return Path(name)

    def place(self, file: UploadFile, number: int, part: Path) -> None:
        """Put a part whose digest is right where it belongs."""
        target = self.open / file.path
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                offset = number * PART_BYTES
                with part.open("rb") as source:
                    while chunk := source.read(1 << 20):
                        offset += os.pwrite(descriptor, chunk, offset)
            finally:
                os.close(descriptor)

    def damaged(self, upload: UploadRecord) -> tuple[str, ...]:
        """Paths of files that are absent, or not what was announced.

        Files in their final place have been compared: the call before was cut off behind `finish`.
        """
        if self.whole.is_dir():
            return ()
        damaged = tuple(file.path for file in upload.files if not self._came(file))
        return () if self.whole.is_dir() else damaged  # another call was first

    def check_headers(self, upload: UploadRecord) -> None:
        """Read what is not to be believed of every file that came; raises `InputError`."""
        if self.whole.is_dir():
            return
        for file in upload.files:
            _check_header(self.open / file.path)

    def finish(self) -> None:
        """Give the files their final place; repeating it changes nothing."""
        for scratch in self.open.glob(".part-*"):
            scratch.unlink(missing_ok=True)
        try:
            self.open.rename(self.whole)
        except OSError:  # another call was first
            if not self.whole.is_dir():
                raise

    def lacks(self, upload: UploadRecord) -> bool:
        """Whether a file has no final place here, or another size than was announced."""
        return any(_size(self.whole / file.path) != file.size for file in upload.files)

    def reopen(self, upload: UploadRecord) -> tuple[str, ...]:
        """Take the files from their final place; paths of those that have the right size."""
        if self.whole.is_dir():
            shutil.rmtree(self.open, ignore_errors=True)
            self.whole.rename(self.open)
        return tuple(f.path for f in upload.files if _size(self.open / f.path) == f.size)

    def remove(self) -> None:
        """Delete everything."""
        for folder in (self.whole, self.open):
            shutil.rmtree(folder, ignore_errors=True)

    def _came(self, file: UploadFile) -> bool:
        place = self.open / file.path
        if file.size == 0:
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            place.touch(mode=0o600)
        try:
            return place.stat().st_size == file.size and sha256_file(place) == file.sha256
        except FileNotFoundError:
            return False


def fetch_upload(settings: Settings, artifacts: ArtifactStore, upload_id: str) -> Path:
    """The folder of a complete upload on this machine; raises `ModelError` where it is gone."""
    folder = settings.uploads_folder / upload_id
    if not artifacts.fetch_folder(UPLOADS, upload_id, folder):
        raise ModelError(
            f"upload {upload_id!r} is gone: upload the model again",
            code="upload_not_found",
            param="model.upload_id",
        )
    return folder


def reopen_lost(
    settings: Settings, artifacts: ArtifactStore, store: UploadStore, upload: UploadRecord
) -> UploadRecord:
    """The upload, which is open again where it was complete and files of it are gone or cut.

    Files that are still here with the right size need not be sent again; completing it compares
    all of them. A job that reads them just now does not find them until then.
    """
    folder = UploadFolder(settings, upload.id)

    def lost() -> bool:
        shared = artifacts.shared_files(UPLOADS, upload.id, folder.whole)
        return any(shared.get(file.path) != file.size for file in upload.files)

    def take_back(locked: UploadRecord) -> tuple[str, ...] | None:
        if not lost():  # another call has mended it
            return None
        artifacts.remove_folder(UPLOADS, upload.id)
        return folder.reopen(locked)

    if upload.state != "complete":
        return upload
    if lost():
        return store.reopen(upload.id, take_back)
    if folder.lacks(upload):  # the artifact store has all of it
        shutil.rmtree(folder.whole, ignore_errors=True)
    return upload


def _size(file: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def collect_uploads(settings: Settings, store: UploadStore) -> int:
    """Remove this machine's files of uploads that are no more; how many folders."""
    with suppress(FileNotFoundError):
        found = list(settings.uploads_folder.iterdir())
        known = {upload.id for upload in store.list()}  # later: folders of new uploads are not seen
        over = [
            folder
            for folder in found
            if folder.name.removesuffix(".open") not in known and not folder.name.startswith(".")
        ]
        for folder in over:
            shutil.rmtree(folder, ignore_errors=True)
        return len(over)
    return 0


def _check_header(file: Path) -> None:
    if file.suffix == ".safetensors":
        read_header(file)
    elif file.suffix == ".gguf":
        read_gguf_header(file)
    elif file.suffix == ".json":
        _check_json(file)


def _check_json(file: Path) -> None:
    size = file.stat().st_size
    problem = f"{size:,} bytes, at most {_MAX_JSON:,} are read" if size > _MAX_JSON else None
    if problem is None:
        try:
            bounded_json.loads(file.read_bytes(), _MAX_JSON_MARKS)
            return
        except ValueError as error:
            problem = str(error)
    raise ModelError(f"{file.name} is no JSON to be read: {problem}", param=file.name)
