"""A Hub repository's config and safetensors headers, without its weights.

Each weight file becomes a sparse file of its true size that holds the header alone, so the same
checks and the same planning read it as read a whole folder. A model of 100 GB costs a few hundred
kilobytes of traffic and of disk.
"""

from __future__ import annotations

import struct
from pathlib import Path
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from bitmill.errors import ModelError
from bitmill.io.safetensors import INDEX_NAME, MAX_HEADER, SINGLE_FILE, read_index
from bitmill.plan.config_json import ADAPTER_FILE, CONFIG_FILE
from bitmill_service.http.problems import ProblemError
from bitmill_service.settings import ServiceSettings
from bitmill_workers.job_spec import HubModel

_MAX_JSON = 64 << 20
_MAX_SHARDS = 512
_FIRST = 1 << 16


def fetch_headers(model: HubModel, settings: ServiceSettings, folder: Path) -> None:
    """Fill `folder` with the repository's JSON files and header-only weight files.

    Raises `ModelError` for files of a wrong form, `ProblemError` `hub_unreachable` where the Hub
    does not answer.
    """
    if model.file is not None:
        raise ModelError(
            f"a plan of {model.file} on the Hub needs the whole file: submit the job, or download "
            "the file below a model root first",
            code="plan_needs_file",
            param="model.file",
        )
    endpoint = (settings.hub_endpoint or constants.ENDPOINT).rstrip("/")
    token = settings.hub_token.get_secret_value() if settings.hub_token else None
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        info = HfApi(endpoint=endpoint, token=token or False).model_info(
            model.repo_id, revision=model.revision, timeout=settings.hub_check_s
        )
        names = [sibling.rfilename for sibling in info.siblings or []]
        revision = quote(info.sha or model.revision, safe="")
        base = f"{endpoint}/{model.repo_id}/resolve/{revision}/"
        with httpx2.Client(
            base_url=base, headers=headers, timeout=settings.hub_check_s, follow_redirects=True
        ) as http:
            _fetch(http, names, folder)
    except (OSError, HfHubHTTPError, httpx2.HTTPError) as error:
        raise ProblemError(
            "hub_unreachable",
            f"the Hub did not deliver {model.repo_id} ({type(error).__name__})",
            param="model.repo_id",
        ) from error


def _fetch(http: httpx2.Client, names: list[str], folder: Path) -> None:
    for name in names:
        if name in (CONFIG_FILE, ADAPTER_FILE, INDEX_NAME):
            (folder / name).write_bytes(_whole(http, name))
    weights = _weight_files(names, folder)
    if len(weights) > _MAX_SHARDS:
        raise ModelError(f"the model has {len(weights)} weight files, at most {_MAX_SHARDS} work")
    for name in weights:
        _write_header_file(http, name, folder / name)


def _weight_files(names: list[str], folder: Path) -> list[str]:
    """Which of a repository's files are the model, as `safetensors_files` decides for a folder."""
    if SINGLE_FILE in names or INDEX_NAME not in names:
        return [name for name in names if name == SINGLE_FILE]
    return sorted(set(read_index(folder).values()) & set(names))


def _whole(http: httpx2.Client, name: str) -> bytes:
    with http.stream("GET", name) as response:
        response.raise_for_status()
        data = b""
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > _MAX_JSON:
                raise ModelError(f"{name} is larger than {_MAX_JSON:,} bytes", param=name)
    return data


def _part(http: httpx2.Client, name: str, start: int, end: int) -> tuple[bytes, int]:
    """Bytes [start, end) of a file, or fewer at its end, and the file's size."""
    with http.stream("GET", name, headers={"Range": f"bytes={start}-{end - 1}"}) as response:
        response.raise_for_status()
        if response.status_code != 206:
            raise ModelError(
                f"{name}: the Hub ignored a range request, so headers alone cannot be read",
                code="plan_needs_file",
                param=name,
            )
        total = response.headers["content-range"].rpartition("/")[2]
        return response.read(), int(total)


def _write_header_file(http: httpx2.Client, name: str, target: Path) -> None:
    data, size = _part(http, name, 0, _FIRST)
    if len(data) >= 8:
        length = struct.unpack("<Q", data[:8])[0]
        if length > MAX_HEADER:
            raise ModelError(
                f"{name} has a header of {length:,} bytes, at most {MAX_HEADER:,} are accepted",
                code="header_too_large",
                param=name,
            )
        if 8 + length > len(data) and len(data) < size:
            data += _part(http, name, len(data), 8 + length)[0]
        data = data[: 8 + length]
    with target.open("wb") as handle:
        handle.write(data)
        handle.truncate(max(size, len(data)))
