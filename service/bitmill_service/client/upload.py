"""Send a folder's files to a service: in parts, in parallel, going on where a call broke."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from bitmill.errors import InputError
from bitmill.io.atomic import sha256_file
from bitmill.io.companions import may_be_sent
from bitmill_service.schemas import UploadEntry, UploadRequest, UploadView

_PARALLEL = 4


def announced(place: Path) -> tuple[Path, UploadRequest]:
    """What a service takes of a model's folder, or one GGUF file; raises `InputError`.

    The folder that its paths are relative to, and the files. Hashes all bytes.
    """
    folder = place.parent if place.is_file() else place
    if place.is_file():
        found = [place]
    elif place.is_dir():
        found = sorted(p for p in [*place.glob("*"), *place.glob("*/*")] if p.is_file())
    else:
        raise InputError(f"{place} is no folder and no file", param=str(place))
    names = {file.relative_to(folder).as_posix(): file for file in found}
    for path in names:
        if path.endswith((".safetensors", ".gguf")) and "/" not in path and not may_be_sent(path):
            raise InputError(
                f"{path!r} cannot be uploaded by this name: rename it, names of weights have "
                "letters, digits, '_', '.' and '-' alone, at most 201",
                code="file_refused",
                param=path,
            )
    wanted = {path: file for path, file in names.items() if may_be_sent(path)}
    if not wanted:
        raise InputError(
            f"{place} holds no model that can be uploaded: it needs *.safetensors or *.gguf",
            code="no_weights",
            param=str(place),
        )
    entries = [
        UploadEntry(path=path, size=file.stat().st_size, sha256=sha256_file(file))
        for path, file in wanted.items()
    ]
    return folder, UploadRequest(files=tuple(entries))


def send_parts(
    upload: UploadView,
    folder: Path,
    put: Callable[[str, int, bytes, str], object],
    on_bytes: Callable[[int], None],
) -> None:
    """Send every part that has not come; `put(path, number, data, digest)` sends one."""
    stop = threading.Event()

    def send(path: str, number: int) -> None:
        if stop.is_set():
            return
        try:
            with (folder / path).open("rb") as file:
                data = _part(file, number, upload.part_size)
            digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
            put(path, number, data, f"sha-256=:{digest}:")
        except BaseException:
            stop.set()
            raise
        on_bytes(len(data))

    with ThreadPoolExecutor(_PARALLEL) as pool:
        sent = []
        for file in upload.files:
            came = set(file.received)
            last = file.size - (file.parts - 1) * upload.part_size
            for number in range(file.parts):
                if number in came:
                    on_bytes(last if number == file.parts - 1 else upload.part_size)
                else:
                    sent.append(pool.submit(send, file.path, number))
        for part in sent:
            part.result()


def _part(file: BinaryIO, number: int, size: int) -> bytes:
    file.seek(number * size)
    return file.read(size)
