"""A Hub repository's config and safetensors headers, without its weights.

Each weight file becomes a sparse file of its true size that holds the header alone, so the same
checks and the same planning read it as read a whole folder. A model of 100 GB costs a few hundred
kilobytes of traffic and of disk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote

import httpx2
from huggingface_hub import constants

from bitmill.errors import ModelError
from bitmill.io.gguf import GgufHeader, TruncatedGguf, read_gguf_header
from bitmill.io.safetensors import INDEX_NAME, MAX_HEADER
from bitmill.plan.config_json import ADAPTER_FILE, CONFIG_FILE
from bitmill.plan.gguf_models import ROTARY_FACTORS
from bitmill_service.settings import ServiceSettings
from bitmill_workers.execution.fetch import hub_errors, hub_info, weight_files
from bitmill_workers.job_spec import HubModel

_MAX_JSON = 64 << 20
_MAX_SHARDS = 512
_FIRST = 1 << 16
_GGUF_PIECES = (1 << 20, 8 << 20, 64 << 20)
"""How far a GGUF file is read, one after the other: its header holds the vocabulary."""
_AT_ONCE = 8


def fetch_headers(model: HubModel, settings: ServiceSettings, folder: Path) -> None:
    """Fill `folder` with the repository's JSON files and header-only weight files.

    Raises `ModelError`, code `hub_unreachable` where the Hub does not deliver what a plan needs.
    """
    info = hub_info(model, settings, settings.hub_check_s)
    names = [sibling.rfilename for sibling in info.siblings or []]
    endpoint = (settings.hub_endpoint or constants.ENDPOINT).rstrip("/")
    revision = quote(info.sha or model.revision, safe="")
    token = settings.hub_token.get_secret_value() if settings.hub_token else None
    with (
        hub_errors(model),
        httpx2.Client(
            base_url=f"{endpoint}/{model.repo_id}/resolve/{revision}/",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=settings.hub_check_s,
            follow_redirects=True,
        ) as http,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        if model.file is not None:
            _write_gguf_header(http, model.file, folder / model.file)
            return
        for name in (CONFIG_FILE, ADAPTER_FILE, INDEX_NAME):
            if name in names:
                (folder / name).write_bytes(_whole(http, name))
        weights = weight_files(names, folder, None)
        if len(weights) > _MAX_SHARDS:
            raise ModelError(
                f"the model has {len(weights)} weight files, at most {_MAX_SHARDS} work"
            )
        for _ in pool.map(lambda name: _write_header(http, name, folder / name), weights):
            pass  # what one of them raises ends the others


def _whole(http: httpx2.Client, name: str) -> bytes:
    with http.stream("GET", name) as response:
        _check(name, response)
        data = b""
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > _MAX_JSON:
                raise ModelError(f"{name} is larger than {_MAX_JSON:,} bytes", param=name)
    return data


def _part(http: httpx2.Client, name: str, start: int, end: int) -> tuple[bytes, int]:
    """Bytes [start, end) of a file, or fewer at its end, and the file's size."""
    with http.stream("GET", name, headers={"Range": f"bytes={start}-{end - 1}"}) as response:
        _check(name, response)
        if response.status_code != 206:
            raise httpx2.HTTPError(f"{name} was not sent in part")
        total = response.headers["content-range"].rpartition("/")[2]
        return response.read(), int(total)


def _check(name: str, response: httpx2.Response) -> None:
    if response.status_code in (401, 403):
        raise ModelError(
            f"the Hub refuses {name} (status {response.status_code}): ask for access and set a "
            "Hub token",
            code="model_gated",
            param="model.repo_id",
        )
    response.raise_for_status()


def _write_header(http: httpx2.Client, name: str, target: Path) -> None:
    write_header(name, target, partial(_part, http, name))


def write_header(name: str, target: Path, part: Callable[[int, int], tuple[bytes, int]]) -> None:
    """A sparse file of the true size that holds a safetensors file's header alone.

    part: bytes [start, end) of the file called `name`, and its size. Raises `ModelError` (code
    `header_too_large`).
    """
    data, size = part(0, _FIRST)
    if len(data) >= 8:
        length = struct.unpack("<Q", data[:8])[0]
        if length > MAX_HEADER:
            raise ModelError(
                f"{name} has a header of {length:,} bytes, at most {MAX_HEADER:,} are accepted",
                code="header_too_large",
                param=name,
            )
        if 8 + length > len(data) and len(data) < size:
            data += part(len(data), 8 + length)[0]
        data = data[: 8 + length]
    target.write_bytes(data)
    _extend(target, size)


def _write_gguf_header(http: httpx2.Client, name: str, target: Path) -> None:
    start = 0
    with target.open("wb") as file:
        for end in _GGUF_PIECES:
            data, size = _part(http, name, start, end)
            file.write(data)
            file.flush()
            start += len(data)
            try:
                header = read_gguf_header(target)
            except TruncatedGguf:
                if start >= size:
                    raise
            else:
                _extend(target, size)
                _write_rotary_factors(http, name, header)
                return
    raise httpx2.HTTPError(f"the header of {name} is longer than {start:,} bytes")


def _write_rotary_factors(http: httpx2.Client, name: str, header: GgufHeader) -> None:
    """Fetch the few values of a GGUF file that its configuration depends on."""
    with header.path.open("r+b") as file:
        for tensor in (header.tensors[t] for t in ROTARY_FACTORS if t in header.tensors):
            file.seek(tensor.begin)
            file.write(_part(http, name, tensor.begin, tensor.begin + tensor.nbytes)[0])


def _extend(file: Path, size: int) -> None:
    """Give a file its true size, without the bytes."""
    os.truncate(file, max(size, file.stat().st_size))
