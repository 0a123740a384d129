"""Uploads: announce a folder's files, send their parts, have the whole checked."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import shutil
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response, status
from starlette.concurrency import run_in_threadpool

from bitmill.errors import InputError, ResourceError
from bitmill.io.companions import may_be_sent
from bitmill_service.api.admission import quota_of
from bitmill_service.api.context import ID_PATTERN, Context, ContextDep, PrincipalDep
from bitmill_service.api.views import upload_view
from bitmill_service.http.openapi import CHANGES, JSON_BODY, refusals
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import UploadList, UploadRequest, UploadView
from bitmill_workers.errors import UploadNotFound
from bitmill_workers.execution.fetch import check_names
from bitmill_workers.settings import Settings
from bitmill_workers.storage.artifacts import UPLOADS
from bitmill_workers.storage.uploads import UploadFolder, reopen_lost
from bitmill_workers.store.uploads import UploadFile, UploadRecord

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

UploadId = Annotated[str, Path(pattern=ID_PATTERN, description="Upload id.")]
_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")
_BYTES = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=UploadView,
    responses=refusals(*JSON_BODY, "quota_bytes", "storage_unavailable"),
)
def create_upload(request: UploadRequest, context: ContextDep, caller: PrincipalDep) -> UploadView:
    """Announce files. The same files give the same upload again, with the parts it has.

    A complete one whose files are gone on the server is open again. 507 where what has not come
    does not fit on the disk.
    """
    files = [UploadFile(file.path, file.size, file.sha256) for file in request.files]
    _check_paths([file.path for file in files])
    quota, settings = quota_of(context, caller), context.settings
    is_new = context.uploads.find(files, tenant=caller.tenant) is None
    if is_new:  # before it is written down
        _check_room(settings, sum(file.size for file in files))
    record = context.uploads.announce(
        files,
        tenant=caller.tenant,
        created_by=caller.key_id,
        keep_s=settings.upload_open_s,
        most_bytes=None if quota is None else quota.bytes,
    )
    record = reopen_lost(settings, context.artifacts, context.uploads, record)
    came = context.uploads.received(record.id)
    if not is_new:
        _check_room(settings, record.missing(came))
    return upload_view(record, came)


@router.get("", response_model=UploadList)
def list_uploads(context: ContextDep, caller: PrincipalDep) -> UploadList:
    """Uploads, oldest first."""
    found = context.uploads.list(tenant=caller.sees)
    return UploadList(uploads=[upload_view(record) for record in found])


@router.get("/{upload_id}", response_model=UploadView, responses=refusals("upload_not_found"))
def get_upload(upload_id: UploadId, context: ContextDep, caller: PrincipalDep) -> UploadView:
    """One upload and the parts that have come."""
    record = context.uploads.get(upload_id, tenant=caller.sees)
    return upload_view(record, context.uploads.received(record.id))


@router.put(
    "/{upload_id}/files/{path:path}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=refusals(*CHANGES, "upload_not_found", "upload_complete", "payload_too_large"),
    openapi_extra=_BYTES,
)
async def send_part(
    upload_id: UploadId,
    path: str,
    request: Request,
    context: ContextDep,
    caller: PrincipalDep,
    part: Annotated[int, Query(ge=0, lt=2**31, description="Number of the part, from 0.")],
    content_digest: Annotated[
        str, Header(max_length=200, description="sha-256=:<base64>: of the part (RFC 9530).")
    ],
) -> None:
    """Store one part of a file whose digest is right; sending it again is fine."""
    record = await run_in_threadpool(context.uploads.get, upload_id, tenant=caller.sees)
    file = _open_file(record, path)
    wanted = _digest(content_digest)
    folder = UploadFolder(context.settings, record.id)
    scratch = await run_in_threadpool(folder.scratch)
    try:
        digest, size = hashlib.sha256(), 0
        with scratch.open("wb") as out:
            async for chunk in request.stream():
                digest.update(chunk)
                size += len(chunk)
                await run_in_threadpool(out.write, chunk)
        expected = file.part_size(part)
        if size != expected or not expected:
            raise _refuse("bad_part", f"part {part} of {path} has {expected:,} bytes, not {size:,}")
        if digest.digest() != wanted:
            raise _refuse("digest_mismatch", f"part {part} of {path} is not what its digest says")
        await run_in_threadpool(folder.place, file, part, scratch)
    finally:
        scratch.unlink(missing_ok=True)
    keep_s = context.settings.upload_open_s
    await run_in_threadpool(context.uploads.note_part, record.id, path, part, keep_s=keep_s)


@router.post(
    "/{upload_id}/complete",
    response_model=UploadView,
    responses=refusals(*CHANGES, "upload_not_found", "upload_incomplete", "storage_unavailable"),
)
def complete_upload(upload_id: UploadId, context: ContextDep, caller: PrincipalDep) -> UploadView:
    """Compare every file with its SHA-256 and read its header; repeating it is fine.

    It reads all bytes, so it takes seconds for every few gigabytes.
    """
    record = context.uploads.get(upload_id, tenant=caller.sees)
    if record.state == "complete":
        return upload_view(record)
    came = context.uploads.received(record.id)
    for file in record.files:
        missing = file.parts - len(came.get(file.path, []))
        if missing:
            raise ProblemError(
                "upload_incomplete",
                f"{missing} of {file.parts} parts of {file.path} have not come",
                param=file.path,
            )
    folder = UploadFolder(context.settings, record.id)
    keep_s = context.settings.upload_keep_s
    try:
        _settle(context, folder, record)
        context.artifacts.share_folder(UPLOADS, record.id, folder.whole)
        return upload_view(context.uploads.finish(record.id, keep_s=keep_s))
    except (FileNotFoundError, UploadNotFound) as error:
        try:
            context.uploads.get(record.id)
        except UploadNotFound:
            _remove(context, record.id)  # what the deletion has not seen
            raise
        raise error


@router.delete(
    "/{upload_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=refusals(*CHANGES, "upload_not_found", "upload_in_use", "storage_unavailable"),
)
def delete_upload(upload_id: UploadId, context: ContextDep, caller: PrincipalDep) -> Response:
    """Remove an upload and its files, which no unfinished job may need."""
    context.uploads.delete(upload_id, tenant=caller.sees)
    _remove(context, upload_id)
    return Response(status_code=status.HTTP_204_NO_CONTENT)


def _settle(context: Context, folder: UploadFolder, record: UploadRecord) -> None:
    """Check the files and give them their final place, unless another call does so meanwhile.

    What is not the announced file is asked for again, so that the same upload can be mended.
    """
    if damaged := folder.damaged(record):
        context.uploads.forget_parts(record.id, damaged)
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise InputError(
            f"{damaged[0]}{more}: not the file that was announced, its SHA-256 differs; send its "
            "parts again, or, where the file has changed since, announce it as it is now",
            code="digest_mismatch",
            param=damaged[0],
        )
    try:
        folder.check_headers(record)
        folder.finish()
    except FileNotFoundError:
        if not folder.whole.is_dir():
            raise


def _remove(context: Context, upload_id: str) -> None:
    context.artifacts.remove_folder(UPLOADS, upload_id)
    UploadFolder(context.settings, upload_id).remove()


def _check_room(settings: Settings, missing: int) -> None:
    """Raise `ResourceError` where so many bytes, and a tenth of them, are not free."""
    settings.data.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.data).free
    if missing * 1.1 > free:
        raise ResourceError(
            f"{missing:,} bytes of the upload are to come and {free:,} are free: ask the service's "
            "operator",
            code="disk_full",
        )


def _check_paths(paths: list[str]) -> None:
    if len({path.lower() for path in paths}) != len(paths):
        raise InputError("a path is named twice", code="file_refused", param="files")
    if not any(path == "learned_parameters.json" for path in paths):
        gguf = next((path for path in paths if path.endswith(".gguf")), None)
        check_names(paths, gguf)
    for path in paths:
        if not may_be_sent(path):
            raise InputError(
                f"{path[:200]!r} is no file of a model that is taken: send *.safetensors, *.gguf, "
                "*.json, tokenizers, chat templates and licences",
                code="file_refused",
                param="files",
            )


def _open_file(record: UploadRecord, path: str) -> UploadFile:
    if record.state != "open":
        raise ProblemError("upload_complete", f"upload {record.id} is complete")
    file = record.file(path)
    if file is None:
        raise _refuse("file_refused", f"{path[:200]!r} was not announced")
    return file


def _digest(header: str) -> bytes:
    match = _DIGEST.fullmatch(header.strip())
    if match is None:
        raise _refuse("bad_part", "Content-Digest must be sha-256=:<base64>: of the part")
    try:
        return base64.b64decode(match[1], validate=True)
    except binascii.Error as error:
        raise _refuse("bad_part", f"Content-Digest is no base64: {error}") from error


def _refuse(code: str, problem: str) -> InputError:
    return InputError(problem, code=code, param="path")
