"""`push`: a folder to a repository of the Hugging Face Hub, in one commit. Torch-free.

    card -> large files one after another, which the Hub keeps -> one commit -> compared

What has arrived of a broken push is not sent again: the Hub knows large files by their digests.
Nothing is visible before the commit. Where the package hf_xet is installed, the Hub's client sends
large files by Xet alone; a Hub without that needs HF_HUB_DISABLE_XET=1. No message of the client is
handed on, because it may hold an address with a signature.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bitmill.config.closed import Closed
from bitmill.config.quantization import Calibration
from bitmill.errors import InputError, ResourceError, VerificationError
from bitmill.io.manifest import check_folder
from bitmill.reporting.model_card import CardFacts, model_card
from bitmill.results import QualityReport

T = TypeVar("T")
Repeat = Callable[[str, Callable[[], T]], T]


class Pushed(Closed):
    """Where a folder lies now, and what was sent of it."""

    repo_id: str
    commit: str
    url: str
    files: int
    bytes: int


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str,
    private: bool = True,
    base_model: str | None = None,
    license: str | None = None,
    calibration: Calibration | None = None,
    report: QualityReport | None = None,
    endpoint: str | None = None,
    repeat: Callable[[str, Callable[[], Any]], Any] = lambda what, step: step(),
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> Pushed:
    """Send a packed folder or an export to the Hub, with a model card made from its report.

    private: of a repository that is made; one that is there stays as it is. base_model, license,
    calibration, report: for the card, as `CardFacts` has them; without a licence the base model's
    is looked up. repeat: calls a step, named in words, and may
    call it again on a ResourceError. on_bytes: told bytes sent and their sum.

    Raises VerificationError where the folder or what the Hub has is not what its manifest says,
    `InputError` (push_refused) where the token may not write, ResourceError (hub_unavailable).
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    source = Path(folder)
    sent = dict.fromkeys(check_folder(source).files)
    api = HfApi(endpoint=endpoint, token=token)

    def step(what: str, call: Callable[[], T]) -> T:
        found: T = repeat(what, lambda: _asked(what, repo_id, call))
        return found

    if base_model and not license:
        license = _license(api, base_model)
    facts = CardFacts(base_model, license, calibration, report)
    contents: dict[str, Path | bytes] = {name: source / name for name in (*sent, *_LISTS)}
    contents |= model_card(source, repo_id, facts)
    step("repository", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    additions = [
        CommitOperationAdd(path, place if isinstance(place, bytes) else str(place))
        for path, place in contents.items()
    ]
    total, done = sum(one.upload_info.size for one in additions), 0
    for one in additions:
        step(one.path_in_repo, lambda one=one: api.preupload_lfs_files(repo_id, [one]))  # type: ignore[misc]
        done += one.upload_info.size
        on_bytes(done, total)
    commit = step("commit", lambda: _commit(api, repo_id, additions))
    info = step("listing", lambda: api.model_info(repo_id, revision=commit, files_metadata=True))
    _compare(contents, {one.rfilename: one for one in info.siblings or []})
    url = f"{api.endpoint}/{repo_id}"
    return Pushed(repo_id=repo_id, commit=commit, url=url, files=len(contents), bytes=total)


_LISTS = ("MANIFEST.json", "SHA256SUMS")


def _commit(api: Any, repo_id: str, additions: list[Any]) -> str:
    made = api.create_commit(repo_id, additions, commit_message="Upload a checkpoint of Bitmill")
    return str(made.oid)


def _license(api: Any, base_model: str) -> str | None:
    """The licence that the base model's card names; None where that cannot be told."""
    try:
        found = api.model_info(base_model, timeout=10).card_data
    except Exception:  # noqa: BLE001  (a card without a licence is better than no push)
        return None
    named = found.get("license") if found else None
    return named if isinstance(named, str) else None


def _asked(what: str, repo_id: str, call: Callable[[], T]) -> T:
    """The answer of one call to the Hub, its errors in words that hold no address."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return call()
    except HFValidationError:
        problem: InputError | ResourceError = InputError(
            f"{repo_id!r} is no name of a repository: give ORG/NAME", param="repo_id"
        )
    except Exception as error:  # noqa: BLE001  (chains of the client hold signed addresses)
        status = None
        cause: BaseException | None = error
        while cause is not None and status is None:
            status = getattr(getattr(cause, "response", None), "status_code", None)
            cause = cause.__cause__
        if isinstance(error, HfHubHTTPError) and status is not None and 400 <= status < 500:
            problem = _refused(what, repo_id, status)
        else:
            told = type(error).__name__ if status is None else f"status {status}"
            problem = ResourceError(
                f"the Hub did not take {what} of {repo_id} ({told}): push again, what has arrived "
                "is not sent twice",
                code="hub_unavailable",
            )
    raise problem from None


def _refused(what: str, repo_id: str, status: int) -> InputError | ResourceError:
    if status in (408, 429):
        return ResourceError(
            f"the Hub did not take {what} of {repo_id} (status {status})", code="hub_unavailable"
        )
    return InputError(
        f"the Hub refuses {what} of {repo_id} (status {status}): the token needs the right to "
        "write there",
        code="push_refused",
        param="repo_id",
    )


def _compare(contents: dict[str, Path | bytes], listed: dict[str, Any]) -> None:
    for path, place in contents.items():
        found = listed.get(path)
        if found is None:
            raise _different(path, "is not there")
        if found.lfs is not None:
            if found.lfs.sha256 != _digest(place, hashlib.sha256()):
                raise _different(path, "has another SHA-256")
        elif found.blob_id is not None and found.blob_id != _git_id(place):
            raise _different(path, "has other bytes")


def _git_id(place: Path | bytes) -> str:
    size = len(place) if isinstance(place, bytes) else place.stat().st_size
    return _digest(place, hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False))


def _digest(place: Path | bytes, digest: Any) -> str:
    if isinstance(place, bytes):
        digest.update(place)
    else:
        with place.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return str(digest.hexdigest())


def _different(path: str, problem: str) -> VerificationError:
    return VerificationError(
        f"{path} {problem} on the Hub after the commit: push again", param=path
    )
