"""Turn a model reference into a local folder: allow-listed roots, or a download from the Hub.

Only safetensors and GGUF are ever fetched or accepted; a checkpoint of pickle files is refused by
name. The Hub's files are downloaded by a child process of the supervisor (this module run as a
program), the only one that gets a network and a token; HF_ENDPOINT chooses another host.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from bitmill.errors import ModelError, ResourceError
from bitmill_workers.job_spec import HubModel, ModelRef, PathModel
from bitmill_workers.settings import Settings

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_PICKLES = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle|msgpack|h5)$")
_CHECK_TIMEOUT_S = 5.0


def check_model(model: ModelRef, settings: Settings) -> None:
    """Refuse within seconds what `fetch_model` would refuse for certain.

    A Hub that does not answer is no reason to refuse: the worker will try. Raises `ModelError`.
    """
    if isinstance(model, HubModel):
        try:
            _hub_info(model, settings, _CHECK_TIMEOUT_S)
        except ModelError as error:
            if error.code != "hub_unreachable":
                raise
    else:
        local_model(model, settings)


def local_model(model: ModelRef, settings: Settings) -> Path:
    """The folder of a model that is on this machine. Raises `ModelError`."""
    if not isinstance(model, PathModel):
        raise ModelError(
            f"model source {model.source!r} is not available here", code="unsupported_source"
        )
    folder, root = resolve_path(model.path, settings.model_roots)
    if not folder.is_dir():
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
        if place.is_symlink():
            raise ModelError(
                f"path {path!r} leads through the symbolic link {part!r}: name the real folder",
                code="path_not_allowed",
                param="model.path",
            )
    return place, root


def check_folder(folder: Path, root: Path, file: str | None) -> None:
    """Refuse a folder without safe weights or with links that leave the root."""
    names = sorted(entry.name for entry in folder.iterdir())
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


def fetch_model(model: HubModel, settings: Settings) -> Path:
    """Download what is needed of a repository and return the folder with its files.

    Files that an earlier job fetched are not fetched again. Raises `ModelError`, `ResourceError`.
    """
    from huggingface_hub import snapshot_download

    info = _hub_info(model, settings, 30.0)
    wanted = [*WANTED[1:], model.file] if model.file else list(WANTED)
    _check_space(info, wanted, settings.hub_cache)
    with _hub_errors(model):
        folder = snapshot_download(
            model.repo_id,
            revision=info.sha or model.revision,
            cache_dir=settings.hub_cache,
            allow_patterns=wanted,
            token=_token(settings),
            endpoint=settings.hub_endpoint,
            max_workers=4,
        )
    return Path(folder)


def _token(settings: Settings) -> str | bool:
    return settings.hub_token.get_secret_value() if settings.hub_token else False


def _hub_info(model: HubModel, settings: Settings, timeout: float) -> ModelInfo:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=settings.hub_endpoint, token=_token(settings))
    with _hub_errors(model):
        info = api.model_info(
            model.repo_id, revision=model.revision, timeout=timeout, files_metadata=True
        )
    check_names([s.rfilename for s in info.siblings or []], model.file)
    return info


class _hub_errors:  # noqa: N801  (a context manager)
    """Turn the Hub client's exceptions into `ModelError` with a stable code."""

    def __init__(self, model: HubModel) -> None:
        self._name = f"{model.repo_id}@{model.revision}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        from huggingface_hub import errors

        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if not isinstance(error, Exception) or isinstance(error, ModelError) or full:
            return
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


def _check_space(info: ModelInfo, wanted: list[str], cache: Path) -> None:
    """Refuse a download that would not leave a tenth of its size free."""
    siblings = info.siblings or []
    size = sum(
        s.size or 0
        for s in siblings
        if any(PurePosixPath(s.rfilename).match(pattern) for pattern in wanted)
    )
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if size * 1.1 > free:
        raise ResourceError(
            f"the model needs {size:,} bytes and {free:,} are free: free some disk space",
            code="disk_full",
        )


def main(argv: list[str]) -> int:
    """Download for a supervisor; the token comes in the environment."""
    from bitmill_workers.execution.child import Emit, serve

    def work(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
        settings = Settings(data=Path(request["data"]), hub_endpoint=request["hub_endpoint"])
        folder = fetch_model(HubModel.model_validate(request["model"]), settings)
        return {"folder": str(folder)}

    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    return serve(argv, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
