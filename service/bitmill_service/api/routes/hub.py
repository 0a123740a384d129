"""Finished jobs as repositories `jobs/<id>` of the Hugging Face Hub's read API.

    HF_ENDPOINT=http://127.0.0.1:8737 hf download jobs/<id>

What clients of the Hub 0.36, 1.x and 2.x ask for: what a repository holds (`siblings` for the old
ones, `/tree` for the new ones) and its files. A job never changes, so it has one revision, called
main: the first 40 digits of a SHA-256 over its files' paths, sizes and digests. Two rules come from
the clients: HEAD of a file is answered here with `X-Repo-Commit`, `ETag` and `Content-Length`,
wherever the file lies; and no header ever speaks of Xet, which they would ask for in vain.

Everything else that a process with this HF_ENDPOINT asks for is "no such repository", quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from bitmill.io.atomic import sha256_json
from bitmill_service.api.context import ContextDep, PrincipalDep
from bitmill_service.api.routes.job_outputs import send_file
from bitmill_service.http.problems import ProblemError
from bitmill_workers.errors import JobNotFound
from bitmill_workers.store.records import Artifact, JobRecord

router = APIRouter(include_in_schema=False)

MAIN = "main"
_POINTER = 134
"""Bytes of the pointer that Git would keep of a large file; clients want the number."""


@dataclass(frozen=True)
class Repository:
    """A finished job as clients of the Hub see it."""

    job: JobRecord
    files: Sequence[Artifact]

    @property
    def name(self) -> str:
        """What comes after the Hub's address."""
        return f"jobs/{self.job.id}"

    @property
    def commit(self) -> str:
        """The one revision: 40 digits, which clients take for one that never changes."""
        return sha256_json([[f.path, f.size, f.sha256] for f in self.files])[:40]

    def info(self) -> dict[str, Any]:
        """What `/api/models/...` answers."""
        return {
            "_id": self.commit[:24],
            "id": self.name,
            "modelId": self.name,
            "author": "jobs",
            "sha": self.commit,
            "createdAt": _time(self.job.created_at),
            "lastModified": _time(self.job.finished_at or self.job.created_at),
            "private": True,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["bitmill", "safetensors"],
            "library_name": "transformers",
            "siblings": [
                {
                    "rfilename": file.path,
                    "size": file.size,
                    "blobId": file.sha256[:40],
                    "lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": _POINTER},
                }
                for file in self.files
            ],
        }

    def tree(self, below: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder; raises `ProblemError` where there is none."""
        prefix = f"{below.strip('/')}/" if below.strip("/") else ""
        inside = [file for file in self.files if file.path.startswith(prefix)]
        if not inside:
            raise self.refuse("EntryNotFound", f"{self.name} has no folder {below!r}")
        entries: dict[str, dict[str, Any]] = {}
        for file in inside:
            parts = file.path.removeprefix(prefix).split("/")
            folders = [prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))]
            for folder in folders if recursive else folders[:1]:
                oid = sha256_json([self.commit, folder])[:40]
                entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
            if recursive or not folders:
                entries[file.path] = {
                    "type": "file",
                    "oid": file.sha256[:40],
                    "size": file.size,
                    "lfs": {"oid": file.sha256, "size": file.size, "pointerSize": _POINTER},
                    "path": file.path,
                }
        return list(entries.values())

    def file(self, path: str) -> Artifact:
        """The file of this exact path; raises `ProblemError`."""
        for file in self.files:
            if file.path == path:
                return file
        raise self.refuse("EntryNotFound", f"{self.name} has no file {path!r}")

    def refuse(self, code: str, detail: str) -> ProblemError:
        """A refusal that clients may keep in mind for this revision."""
        return _refusal(code, detail, {"X-Repo-Commit": self.commit})


def find_repository(
    job_id: str, context: ContextDep, caller: PrincipalDep, revision: str = MAIN
) -> Repository:
    """The job and revision of the path; raises `ProblemError` in the terms of the Hub."""
    try:
        job = context.jobs.get(job_id, tenant=caller.sees)
    except JobNotFound as error:
        raise _refusal("RepoNotFound", f"there is no repository jobs/{job_id}") from error
    if job.discarded_at is not None:
        raise _refusal("RepoNotFound", f"the files of job {job.id} were discarded")
    if job.state != "succeeded":
        raise _refusal("RepoNotFound", f"job {job.id} is {job.shown_state} and has no files")
    found = Repository(job, context.jobs.artifacts(job.id))
    if revision not in (MAIN, found.commit):
        raise found.refuse("RevisionNotFound", f"{found.name} has no revision {revision!r}")
    return found


RepositoryDep = Annotated[Repository, Depends(find_repository)]


@router.get("/api/models/jobs/{job_id}")
@router.get("/api/models/jobs/{job_id}/revision/{revision}")
def read_info(repository: RepositoryDep) -> dict[str, Any]:
    """What the repository is and holds."""
    return repository.info()


@router.get("/api/models/jobs/{job_id}/tree/{revision}")
@router.get("/api/models/jobs/{job_id}/tree/{revision}/{path:path}")
def read_tree(
    repository: RepositoryDep, path: str = "", recursive: str = "false"
) -> list[dict[str, Any]]:
    """The files and folders below a folder; 0.36 spells booleans with a capital."""
    return repository.tree(path, recursive=recursive.lower() in ("true", "1"))


@router.get("/api/models/jobs/{job_id}/refs")
def read_refs(repository: RepositoryDep) -> dict[str, Any]:
    """The one branch."""
    main = {"name": MAIN, "ref": f"refs/heads/{MAIN}", "targetCommit": repository.commit}
    return {"branches": [main], "converts": [], "tags": []}


@router.get("/jobs/{job_id}/resolve/{revision}/{path:path}")
@router.head("/jobs/{job_id}/resolve/{revision}/{path:path}")
def read_file(
    request: Request, repository: RepositoryDep, context: ContextDep, path: str
) -> Response:
    """A file's bytes, or 302 to where they lie; HEAD is answered here in either case."""
    answer = send_file(request, context, repository.file(path))
    answer.headers["X-Repo-Commit"] = repository.commit
    return answer


@router.get("/api/{rest:path}")
@router.head("/api/{rest:path}")
def read_other(rest: str) -> Response:
    """What only the Hub itself has."""
    raise _refusal("RepoNotFound", f"this service is not the Hub and has no {rest[:200]!r}")


@router.get("/{owner}/{name}/resolve/{rest:path}")
@router.head("/{owner}/{name}/resolve/{rest:path}")
def read_other_file(owner: str, name: str, rest: str) -> Response:
    """A repository of the Hub itself."""
    detail = f"this service has repositories jobs/<id> alone, not {owner[:96]}/{name[:96]}"
    raise _refusal("RepoNotFound", detail)


def _refusal(code: str, detail: str, headers: dict[str, str] | None = None) -> ProblemError:
    told = {"X-Error-Code": code, "X-Error-Message": _plain(detail), **(headers or {})}
    return ProblemError("not_found", detail, headers=told)


def _plain(text: str) -> str:
    """The text as a header can hold it."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
