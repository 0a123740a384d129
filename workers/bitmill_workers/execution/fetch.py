"""Turn a model reference into a local folder: allow-listed roots, or a download from the Hub.

Only safetensors and GGUF are ever fetched or accepted; a checkpoint of pickle files is refused by
name. The Hub's files are downloaded by a child process of the supervisor (this module run as a
program), the only one that gets a network and a token; HF_ENDPOINT chooses another host.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bitmill.errors import ModelError, ResourceError, raise_resource_error
from bitmill.io.companions import is_companion
from bitmill.io.safetensors import INDEX_NAME, SINGLE_FILE
from bitmill.plan.config_json import ADAPTER_FILE, CONFIG_FILE
from bitmill_workers.execution.hub_download import (
    HubDownload,
    HubFile,
    Notify,
    Passing,
    Patience,
    asked_wait,
    passing_status,
    valid_digest,
)
from bitmill_workers.job_spec import HubModel, ModelRef, PathModel, UploadModel
from bitmill_workers.settings import Settings

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import RepoSibling

_SAFETENSORS = re.compile(r"[\w.-]{1,200}\.safetensors")
_PICKLES = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle|msgpack|h5)$")


def local_model(model: ModelRef, settings: Settings) -> Path:
    """The folder of a model that is on this machine. Raises `ModelError`."""
    if isinstance(model, UploadModel):
        folder = settings.uploads_folder.resolve() / model.upload_id
        if not folder.is_dir():
            raise ModelError(
                f"upload {model.upload_id!r} is not here",
                code="upload_not_found",
                param="model.upload_id",
            )
        check_folder(folder, folder, model.file)
        return folder
    if not isinstance(model, PathModel):
        raise ModelError(
            f"model source {model.source!r} is not available here", code="unsupported_source"
        )
    folder, root = resolve_path(model.path, settings.model_roots)
    if not holds(folder.is_dir):
        raise ModelError(
            f"there is no folder {model.path!r}", code="model_not_found", param="model"
        )
    check_folder(folder, root, model.file)
    return folder


def resolve_path(path: str, roots: dict[str, Path]) -> tuple[Path, Path]:
    """The place of `<root name>/<relative path>`, and that root's real path.

    Raises `ModelError` (code `path_not_allowed`) for an unknown root, an absolute path, `..`, or
    a symbolic link on the way.
    """
    parts = PurePosixPath(path).parts
    bad = "\\" in path or "\0" in path or path.startswith(("/", "~")) or ".." in parts
    if bad or not parts or parts[0] not in roots:
        known = ", ".join(sorted(roots)) or "none are configured"
        raise ModelError(
            f"path {path!r} is not below an allowed root: start it with one of: {known}",
            code="path_not_allowed",
            param="model.path",
        )
    root = roots[parts[0]].resolve()
    place = root
    for part in parts[1:]:
        place = place / part
        if holds(place.is_symlink):
            raise ModelError(
                f"path {path!r} leads through the symbolic link {part!r}: name the real folder",
                code="path_not_allowed",
                param="model.path",
            )
    return place, root


def holds(look: Callable[[], bool]) -> bool:
    """What a look at a path says; False where the file system cannot hold such a path at all.

    Raises `ModelError` (code `path_not_allowed`) where the service may not look.
    """
    try:
        return look()
    except PermissionError as error:
        raise _unreadable() from error
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL):
            raise
        return False


def _unreadable() -> ModelError:
    return ModelError(
        "the service may not read this path: change its permissions",
        code="path_not_allowed",
        param="model.path",
    )


def check_folder(folder: Path, root: Path, file: str | None) -> None:
    """Refuse a folder without safe weights or with links that leave the root."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except PermissionError as error:
        raise _unreadable() from error
    for name in names:
        if not (folder / name).resolve().is_relative_to(root):
            raise ModelError(
                f"{name} is a symbolic link that leaves the allowed root: copy the file",
                code="path_not_allowed",
                param="model.path",
            )
    check_names(names, file)


def check_names(names: list[str], file: str | None) -> None:
    """Refuse a set of files without safetensors or without the named GGUF file."""
    if file is not None:
        if file not in names:
            raise ModelError(
                f"there is no file {file!r} in the model", code="file_not_found", param="model.file"
            )
        return
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if _PICKLES.search(name)]
    if pickles:
        raise ModelError(
            f"{pickles[0]} can run code when it is loaded, and there are no safetensors: "
            "convert the checkpoint to safetensors",
            code="pickle_refused",
            param="model",
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    hint = f'set "file" to one of {", ".join(gguf[:5])}' if gguf else "it needs *.safetensors"
    raise ModelError(
        f"the model has no safetensors files: {hint}", code="no_weights", param="model"
    )


def fetch_model(model: HubModel, settings: Settings, notify: Notify = lambda message: None) -> Path:
    """Download what is needed of a repository and return the folder with its files.

    Files that an earlier job fetched are compared and not fetched again. notify: takes progress
    and warnings. Raises `ModelError`, `ResourceError`.
    """
    from huggingface_hub import constants

    patience = Patience(settings.hub_patience_s, notify)
    info = patience.repeat(f"{model.repo_id}@{model.revision}", lambda: _ask_hub(model, settings))
    listed = {sibling.rfilename: _hub_file(sibling) for sibling in info.siblings or []}
    endpoint = (settings.hub_endpoint or constants.ENDPOINT).rstrip("/")
    revision = info.sha or model.revision
    token = _token(settings)
    with HubDownload(
        f"{endpoint}/{model.repo_id}/resolve/{quote(revision, safe='')}/",
        {"Authorization": f"Bearer {token}"} if token else {},
        settings.hub_cache / f"models--{model.repo_id.replace('/', '--')}",
        valid_digest(info.sha) or hashlib.sha256(revision.encode()).hexdigest(),
        patience,
        notify,
    ) as download:
        small = [download.told(listed[path]) for path in sorted(listed) if _is_small(path)]
        _check_space(download.missing_bytes(small), settings.hub_cache)
        download.fetch(small)
        weights = weight_files(list(listed), download.snapshot, model.file)
        large = [download.told(listed[path]) for path in weights]
        _check_space(download.missing_bytes(large), settings.hub_cache)
        download.fetch(large)
        return download.snapshot


def _is_small(path: str) -> bool:
    return path in (CONFIG_FILE, INDEX_NAME, ADAPTER_FILE) or is_companion(path)


def weight_files(names: list[str], folder: Path, file: str | None) -> list[str]:
    """The names of a repository's files that hold the model's weights.

    file: the GGUF file that was asked for. Otherwise as transformers chooses: the single file,
    else the files of the index, which lies in `folder` already; without either all safetensors
    files beside config.json.
    """
    if file is not None:
        return [file]
    found = sorted(name for name in names if _SAFETENSORS.fullmatch(name))
    if SINGLE_FILE in found:
        return [SINGLE_FILE]
    if INDEX_NAME in names:
        # A damaged index is for the plan to refuse, which says what is wrong with it.
        with suppress(ValueError, RecursionError, LookupError, TypeError, AttributeError):
            index = json.loads((folder / INDEX_NAME).read_bytes())
            named = set(index["weight_map"].values())
            return [name for name in found if name in named]
    return found


def _hub_file(sibling: RepoSibling) -> HubFile:
    lfs = sibling.lfs
    digest = valid_digest(lfs.sha256) if lfs else valid_digest(sibling.blob_id)
    return HubFile(sibling.rfilename, sibling.size, digest)


def _ask_hub(model: HubModel, settings: Settings) -> ModelInfo:
    """The repository's listing; raises `Passing` where another try may give it."""
    try:
        return hub_info(model, settings, 30.0)
    except ModelError as error:
        if error.code != "hub_unreachable":
            raise
        answer = getattr(error.__cause__, "response", None)
        if answer is None:
            raise Passing(type(error.__cause__).__name__) from error
        if not passing_status(answer.status_code):
            raise
        raise Passing(f"status {answer.status_code}", asked_wait(answer.headers)) from error


def _token(settings: Settings) -> str | None:
    return settings.hub_token.get_secret_value() if settings.hub_token else None


def hub_info(model: HubModel, settings: Settings, timeout: float) -> ModelInfo:
    """The repository's listing with the sizes of its files.

    Raises `ModelError`: code `hub_unreachable` where the Hub did not answer within `timeout`
    seconds, others for what is missing, closed to this service, or holds no weights to be read.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=settings.hub_endpoint, token=_token(settings) or False)
    with hub_errors(model):
        info = api.model_info(
            model.repo_id, revision=model.revision, timeout=timeout, files_metadata=True
        )
    check_names([s.rfilename for s in info.siblings or []], model.file)
    return info


class hub_errors:  # noqa: N801  (a context manager)
    """Turn the exceptions of HTTP clients into `ModelError` with a stable code."""

    def __init__(self, model: HubModel) -> None:
        self._name = f"{model.repo_id}@{model.revision}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        from huggingface_hub import errors

        if not isinstance(error, Exception) or isinstance(error, ModelError):
            return
        raise_resource_error(error)
        known: tuple[tuple[type[BaseException], str, str], ...] = (
            (errors.GatedRepoError, "model_gated", "is gated: ask for access and set a Hub token"),
            (errors.RevisionNotFoundError, "revision_not_found", "has no such revision"),
            (errors.RepositoryNotFoundError, "model_not_found", "does not exist, or is private"),
            (errors.HFValidationError, "model_not_found", "is not a repository name"),
        )
        for kind, code, problem in known:
            if isinstance(error, kind):
                raise ModelError(
                    f"model {self._name} {problem}", code=code, param="model.repo_id"
                ) from error
        raise ModelError(
            f"the Hub did not deliver {self._name} ({type(error).__name__}): try again later, "
            "or check HF_ENDPOINT",
            code="hub_unreachable",
            param="model.repo_id",
        ) from error


def _check_space(size: int, cache: Path) -> None:
    """Refuse a download that would not leave a tenth of its size free."""
    free = shutil.disk_usage(cache).free
    if size * 1.1 > free:
        raise ResourceError(
            f"the model needs {size:,} bytes and {free:,} are free",
            code="disk_full",
        )


def main(argv: list[str]) -> int:
    """Download for a supervisor; the token comes in the environment."""
    from bitmill_workers.execution.child import Emit, serve

    def work(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
        settings = Settings(
            data=Path(request["data"]),
            hub_endpoint=request["hub_endpoint"],
            hub_patience_s=request["hub_patience_s"],
        )
        folder = fetch_model(HubModel.model_validate(request["model"]), settings, emit)
        return {"folder": str(folder)}

    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    return serve(argv, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
