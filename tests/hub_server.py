"""A small Hub on loopback: repositories are folders, served with ranges."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from bitmill_service.api.files import StoredFile, file_response

SHA = "b" * 40


def hub_app(root: Path) -> FastAPI:
    """The parts of the Hub's read API that planning and fetching use, for `root/<org>/<name>`."""
    app = FastAPI()

    @app.get("/api/models/{org}/{name}")
    @app.get("/api/models/{org}/{name}/revision/{revision}")
    def info(org: str, name: str, revision: str = "main") -> Response:
        folder = root / org / name
        if not folder.is_dir():
            return _missing("RepoNotFound")
        if revision not in ("main", SHA):
            return _missing("RevisionNotFound")
        return JSONResponse(
            {
                "id": f"{org}/{name}",
                "modelId": f"{org}/{name}",
                "sha": SHA,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": [_sibling(file) for file in sorted(folder.iterdir())],
                "cardData": _card(folder / "README.md"),
            }
        )

    @app.get("/api/models/{org}/{name}/tree/{revision}")
    def tree(org: str, name: str, revision: str) -> Response:
        entries = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
            for file in sorted((root / org / name).iterdir())
        ]
        return JSONResponse(entries)

    @app.get("/{org}/{name}/resolve/{revision}/{file}")
    @app.head("/{org}/{name}/resolve/{revision}/{file}")
    def resolve(org: str, name: str, revision: str, file: str, request: Request) -> Response:
        path = root / org / name / file
        if not path.is_file():
            return _missing("EntryNotFound")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        stored = StoredFile(path, file, path.stat().st_size, digest)
        answer = file_response(stored, request.method, request.headers)
        answer.headers["x-repo-commit"] = SHA
        return answer

    return app


def _card(readme: Path) -> dict[str, Any] | None:
    """The front matter of a card."""
    if not readme.is_file():
        return None
    found: dict[str, Any] = yaml.safe_load(readme.read_text().split("---\n")[1])
    return found


def _sibling(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
    told = {"rfilename": file.name, "size": len(data), "blobId": blob}
    if file.suffix != ".safetensors":
        return told
    digest = hashlib.sha256(data).hexdigest()
    return told | {"lfs": {"sha256": digest, "size": len(data), "pointerSize": 134}}


def _missing(code: str) -> Response:
    return JSONResponse({}, 404, headers={"X-Error-Code": code, "X-Repo-Commit": SHA})
