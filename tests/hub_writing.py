"""The write side of a Hub on loopback: repositories, preupload, Git LFS and commits."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from hub_server import SHA, hub_app

TOKEN = "hf_this_is_the_right_one"


@dataclass
class WritableHub:
    """Repositories `root/<org>/<name>`, writable with `TOKEN`.

    put: digests of large files that were sent, in order. refuse_puts_after: so many are taken,
    None for all. refusals: of the next ones, so many are refused.
    kept_as: what a commit leaves of a file, by its path, in place of what was sent; None for
    nothing.
    """

    root: Path
    put: list[str] = field(default_factory=list)
    refuse_puts_after: int | None = None
    refusals: int = 0
    kept_as: dict[str, bytes | None] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)

    def app(self) -> FastAPI:
        app = FastAPI()

        def may_write(request: Request) -> bool:
            return request.headers.get("authorization") == f"Bearer {TOKEN}"

        @app.post("/api/repos/create")
        async def create(request: Request) -> Response:
            asked = await request.json()
            if not may_write(request):
                return JSONResponse({"error": "no"}, 403)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if (self.root / name).is_dir() else 200
            (self.root / name).mkdir(parents=True, exist_ok=True)
            self.private.setdefault(name, asked.get("visibility") == "private")
            return JSONResponse({"url": f"{request.base_url}{name}"}, status)

        @app.post("/api/validate-yaml")
        def validate() -> Response:
            return JSONResponse({"errors": [], "warnings": []})

        @app.post("/api/models/{org}/{name}/preupload/{revision}")
        async def preupload(request: Request) -> Response:
            files = (await request.json())["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in files
            ]
            return JSONResponse({"files": modes})

        @app.post("/{org}/{name}.git/info/lfs/objects/batch")
        async def batch(request: Request) -> Response:
            objects: list[dict[str, Any]] = []
            for one in (await request.json())["objects"]:
                told = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in self.stored:
                    address = f"{request.base_url}lfs/{one['oid']}?signature=secret"
                    told["actions"] = {"upload": {"href": address, "header": {}}}
                objects.append(told)
            return JSONResponse({"transfer": "basic", "objects": objects})

        @app.put("/lfs/{oid}")
        async def put(oid: str, request: Request) -> Response:
            body = await request.body()
            if self.refuse_puts_after is not None and len(self.put) >= self.refuse_puts_after:
                return Response(status_code=400)
            if self.refusals:
                self.refusals -= 1
                return Response(status_code=400)
            assert hashlib.sha256(body).hexdigest() == oid
            self.put.append(oid)
            self.stored[oid] = body
            return Response(status_code=200)

        @app.post("/api/models/{org}/{name}/commit/{revision}")
        async def commit(org: str, name: str, request: Request) -> Response:
            if not may_write(request):
                return JSONResponse({"error": "no"}, 403)
            for line in (await request.body()).splitlines():
                told = json.loads(line)
                value, place = told["value"], self.root / org / name
                if told["key"] == "file":
                    (place / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif told["key"] == "lfsFile":
                    (place / value["path"]).write_bytes(self.stored[value["oid"]])
            for path, content in self.kept_as.items():
                if content is None:
                    (self.root / org / name / path).unlink()
                else:
                    (self.root / org / name / path).write_bytes(content)
            return JSONResponse({"commitUrl": f"{request.base_url}{org}/{name}", "commitOid": SHA})

        app.mount("/", hub_app(self.root))
        return app
