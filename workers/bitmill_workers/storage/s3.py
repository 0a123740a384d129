"""Published files in S3-compatible storage: `<prefix>/<job id>/<token>/<path>`.

The runner writes to a local folder; the supervisor uploads it (in parts where files are large) and
then makes it visible in the database. Downloads go straight to the storage by presigned addresses,
which are good for starting a download for `presign_s`. Given up: listing is the only way to find
garbage, so it is looked for rarely.

A store that hangs is waited for in threads of which none holds up the end of the process: `stop`
ends the waiting of all callers at once.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from bitmill.errors import ResourceError
from bitmill_workers.settings import Settings
from bitmill_workers.storage.artifacts import PROFILES, UPLOADS
from bitmill_workers.storage.listing import listed_files
from bitmill_workers.store.records import Artifact

CHECK_CONNECT_S, CHECK_ANSWER_S = 1, 2
"""`check` lets the object store take so long, once: to be reached, and to answer."""
CHECK_KEEP_S = 5.0
"""What `check` found holds for so long."""

_PART = 16 << 20
_log = logging.getLogger(__name__)
T = TypeVar("T")
_FAILURES = (BotoCoreError, ClientError, boto3.exceptions.S3UploadFailedError)


class StorageUnavailable(ResourceError):
    """The object store refused or did not answer; the attempt may be repeated."""

    code = "storage_unavailable"
    hint = "Try again soon; the object store does not answer."


class S3Artifacts:
    """A bucket of an S3-compatible object store.

    for_clients: whether somebody waits for the answers. A store that hangs is then given up within
    half a minute, where workers wait for minutes; files of any size are carried patiently by both.
    """

    def __init__(self, settings: Settings, *, for_clients: bool = False) -> None:
        assert settings.s3_bucket is not None
        self._bucket = settings.s3_bucket
        self._prefix = settings.s3_prefix.strip("/")
        self._presign_s = settings.presign_s
        self._staging = settings.artifacts_folder
        self._carrier = _client(settings, settings.s3_endpoint)
        hurry = _HURRY if for_clients else {}
        self._client = _client(settings, settings.s3_endpoint, **hurry)
        public = settings.s3_public_endpoint
        self._signer = _client(settings, public) if public else self._client
        self._checker = _client(
            settings,
            settings.s3_endpoint,
            retries={"total_max_attempts": 1},
            connect_timeout=CHECK_CONNECT_S,
            read_timeout=CHECK_ANSWER_S,
        )
        self._check_lock = threading.Lock()
        self._checked_at: float | None = None
        self._check_found: StorageUnavailable | None = None
        self._answers: set[Future[Any]] | None = set()
        self._answers_lock = threading.Lock()
        self._transfer = TransferConfig(
            multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=4
        )

    def prepare(self) -> None:
        """Create the bucket unless it exists."""

        def create() -> None:
            with suppress(self._client.exceptions.BucketAlreadyOwnedByYou):
                self._client.create_bucket(Bucket=self._bucket)

        self._ask(f"bucket {self._bucket} cannot be created", create)

    def check(self) -> None:
        """List one object, which every use of the bucket needs to be allowed; callers at the same
        time share one answer, and one line of the log."""
        with self._check_lock:
            now = time.monotonic()
            if self._checked_at is None or now - self._checked_at > CHECK_KEEP_S:
                self._check_found = self._look()
                self._checked_at = time.monotonic()
            if self._check_found is not None:
                raise StorageUnavailable(self._check_found.message)

    def attempt_folder(self, job_id: str, token: int) -> Path:
        """A local folder; what it holds is uploaded by `publish`."""
        return self._staging / job_id / str(token)

    def publish(
        self, job_id: str, token: int, on_bytes: Callable[[int, int], None]
    ) -> list[Artifact]:
        """Upload the attempt's files and check their stored sizes. Raises `StorageUnavailable`."""
        folder = self.attempt_folder(job_id, token)
        files = listed_files(folder)
        total, done = sum(size for _, size, _ in files), 0

        def on_part(count: int) -> None:
            nonlocal done
            done += count
            on_bytes(done, total)

        stored = []
        for path, size, sha256 in files:
            key = f"{job_id}/{token}/{path}"
            self._upload(folder / path, key, size, on_part)
            stored.append(Artifact(path, size, sha256, key))
        return stored

    def local_path(self, artifact: Artifact) -> Path | None:
        """None: files are in the bucket."""
        return None

    def url(self, artifact: Artifact) -> str | None:
        """A presigned address for GET, named as the file is."""
        name = quote(artifact.path.rpartition("/")[2], safe="")
        return str(
            self._signer.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": self._bucket,
                    "Key": self._key(artifact.storage_key),
                    "ResponseContentDisposition": f"attachment; filename*=utf-8''{name}",
                },
                ExpiresIn=self._presign_s,
            )
        )

    def read(self, artifact: Artifact) -> bytes:
        """The object's content."""
        return self._get(artifact)

    def read_part(self, artifact: Artifact, start: int, end: int) -> bytes:
        """A part of the object's content."""
        return self._get(artifact, Range=f"bytes={start}-{end - 1}")

    def fetch(self, artifact: Artifact, target: Path) -> None:
        """Download the object. Raises `StorageUnavailable`."""
        key = self._key(artifact.storage_key)
        self._ask(
            f"{artifact.path} cannot be read",
            lambda: self._carrier.download_file(
                self._bucket, key, str(target), Config=self._transfer
            ),
        )

    def attempts(self) -> Iterator[tuple[str, int]]:
        """Every `<job id>/<token>` prefix of the bucket and every local staging folder."""
        found = {
            (place.parent.name, int(place.name))
            for place in self._staging.glob("*/*")
            if place.name.isdigit()
        }
        for job in self._folders(f"{self._prefix}/"):
            job_id = job.rsplit("/", 2)[-2]
            attempts = () if job_id in (PROFILES, UPLOADS) else self._folders(job)
            tokens = (attempt.rsplit("/", 2)[-2] for attempt in attempts)
            found |= {(job_id, int(token)) for token in tokens if token.isdecimal()}
        yield from sorted(found)

    def remove(self, job_id: str, token: int) -> None:
        """Delete the attempt's objects, its unfinished uploads and its local folder."""
        self.drop_local(job_id, token)
        prefix = self._key(f"{job_id}/{token}/")

        def remove() -> None:
            uploads = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=prefix)
            for upload in uploads.get("Uploads", []):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
            self._delete(prefix)

        self._ask(f"attempt {job_id}/{token} cannot be removed", remove)

    def drop_local(self, job_id: str, token: int) -> None:
        """Delete the attempt's local folder, and the job's when it was the last."""
        shutil.rmtree(self.attempt_folder(job_id, token), ignore_errors=True)
        parent = self._staging / job_id
        if parent.is_dir() and not any(parent.iterdir()):
            shutil.rmtree(parent, ignore_errors=True)

    def share_folder(self, kind: str, name: str, folder: Path) -> None:
        """Upload the folder's files; the same content has the same keys."""
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            path = file.relative_to(folder).as_posix()
            key = f"{kind}/{name}/{path}"
            self._upload(file, key, file.stat().st_size, lambda _: None)

    def fetch_folder(self, kind: str, name: str, folder: Path) -> bool:
        """Download the folder's files unless `folder` is there already."""
        if folder.is_dir():
            return True
        prefix = self._key(f"{kind}/{name}/")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as scratch:
            arriving = Path(scratch, folder.name)

            def fetch() -> None:
                for page in self._pages(Prefix=prefix):
                    for item in page.get("Contents", []):
                        target = arriving / item["Key"].removeprefix(prefix)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        self._carrier.download_file(self._bucket, item["Key"], str(target))

            self._ask(f"{kind}/{name} cannot be read", fetch)
            if arriving.is_dir():
                # Another thread may have brought the same content in the meantime.
                with suppress(OSError):
                    arriving.rename(folder)
        return folder.is_dir()

    def shared_files(self, kind: str, name: str, folder: Path) -> dict[str, int]:
        """The folder's objects. Raises `StorageUnavailable`."""
        prefix = self._key(f"{kind}/{name}/")
        pages = self._ask(
            f"{kind}/{name} cannot be listed", lambda: list(self._pages(Prefix=prefix))
        )
        items = [item for page in pages for item in page.get("Contents", [])]
        return {item["Key"].removeprefix(prefix): item["Size"] for item in items}

    def remove_folder(self, kind: str, name: str) -> None:
        """Delete the folder's objects."""
        prefix = self._key(f"{kind}/{name}/")
        self._ask(f"{kind}/{name} cannot be removed", lambda: self._delete(prefix))

    def stop(self) -> None:
        """Whoever waits for the store, now or later, gets `StorageUnavailable` at once."""
        with self._answers_lock:
            answers, self._answers = self._answers or (), None
        for answer in answers:
            with suppress(InvalidStateError):
                answer.set_exception(_stopped())

    def _ask(self, problem: str, call: Callable[[], T]) -> T:
        """What `call` gets from the store; `StorageUnavailable` where it fails or `stop` is called.

        problem: what is then not done, for the message.
        """
        answer: Future[T] = Future()
        with self._answers_lock:
            if self._answers is None:
                raise _stopped()
            self._answers.add(answer)

        def work() -> None:
            try:
                found = call()
            except BaseException as error:  # noqa: BLE001  (the caller raises it)
                with suppress(InvalidStateError):
                    answer.set_exception(error)
            else:
                with suppress(InvalidStateError):
                    answer.set_result(found)

        try:
            threading.Thread(target=work, name="object-store", daemon=True).start()
            return answer.result()
        except _FAILURES as error:
            raise _unavailable(problem, error) from error
        finally:
            with self._answers_lock:
                if self._answers is not None:
                    self._answers.discard(answer)

    def _look(self) -> StorageUnavailable | None:
        asked = {"Bucket": self._bucket, "Prefix": f"{self._prefix}/"}
        try:
            self._ask(
                f"bucket {self._bucket} cannot be listed",
                lambda: self._checker.list_objects_v2(**asked, MaxKeys=1),
            )
        except StorageUnavailable as away:
            _log.warning("%s", away.message)
            return away
        return None

    def _delete(self, prefix: str) -> None:
        for page in self._pages(Prefix=prefix):
            objects = [{"Key": item["Key"]} for item in page.get("Contents", [])]
            if objects:
                self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects})

    def _get(self, artifact: Artifact, **part: str) -> bytes:
        place = {"Bucket": self._bucket, "Key": self._key(artifact.storage_key)}
        return self._ask(
            f"{artifact.path} cannot be read",
            lambda: bytes(self._client.get_object(**place, **part)["Body"].read()),
        )

    def _key(self, storage_key: str) -> str:
        return f"{self._prefix}/{storage_key}"

    def _upload(self, file: Path, key: str, size: int, on_part: Callable[[int], None]) -> None:
        place = {"Bucket": self._bucket, "Key": self._key(key)}

        def upload() -> int:
            self._carrier.upload_file(str(file), **place, Callback=on_part, Config=self._transfer)
            return int(self._client.head_object(**place)["ContentLength"])

        stored = self._ask(f"{file.name} cannot be uploaded", upload)
        if stored != size:
            raise StorageUnavailable(f"{file.name} was stored with {stored} bytes, not {size}")

    def _pages(self, **query: str) -> Iterator[dict[str, Any]]:
        listing = self._client.get_paginator("list_objects_v2")
        yield from listing.paginate(Bucket=self._bucket, **query)

    def _folders(self, prefix: str) -> list[str]:
        pages = self._ask(
            "stored attempts cannot be listed",
            lambda: list(self._pages(Prefix=prefix, Delimiter="/")),
        )
        return [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", [])]


_PATIENCE: dict[str, Any] = {
    "retries": {"mode": "standard", "max_attempts": 5},
    "connect_timeout": 5,
    "read_timeout": 60,
}
_HURRY: dict[str, Any] = {
    "retries": {"mode": "standard", "total_max_attempts": 2},
    "connect_timeout": 2,
    "read_timeout": 10,
}


def _client(settings: Settings, endpoint: str | None, **patience: Any) -> Any:
    secret = settings.s3_secret_key
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            **(_PATIENCE | patience),
        ),
    )


def _stopped() -> StorageUnavailable:
    return StorageUnavailable("the service is stopping")


def _unavailable(problem: str, error: Exception) -> StorageUnavailable:
    answer = type(error).__name__
    if isinstance(error, ClientError):
        answer = error.response.get("Error", {}).get("Code", answer)
    return StorageUnavailable(f"{problem}: the object store answered {answer}")
