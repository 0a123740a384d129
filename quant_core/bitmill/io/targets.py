"""Folders and files that a user named for what Bitmill writes: nothing else in them is ever lost.

    result    absent, empty, or an earlier result that holds only what its manifest lists
    kept      absent, or holding only entries that Bitmill keeps there (a work folder, profiles)
    file      absent, or an earlier file of the same kind

No folder may be the source, lie in it or hold it, nor overlap another folder of the same run. Every
check is made before work begins, and that of a result again before it is replaced. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from bitmill.errors import FormatError, InputError
from bitmill.io.atomic import is_temporary
from bitmill.io.companions import is_companion
from bitmill.io.manifest import MANIFEST_NAME, SUMS_NAME, read_manifest

_RESULT_FILES = frozenset(
    {
        MANIFEST_NAME,
        SUMS_NAME,
        "bit_width_map.json",
        "config.json",
        "learned_parameters.json",
        "made_for.json",
        "model.safetensors.index.json",
        "profile_summary.json",
        "quality.json",
    }
)
"""What results hold beside weights and what came with the source."""


def check_result(target: Path, *, param: str = "out") -> None:
    """Raise InputError (code `output_exists`) where `target` holds anything but an old result."""
    _check_place(target, param)
    if not target.exists():
        return
    entries = sorted(path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    if not entries and not any(target.iterdir()):
        return
    known = result_names(target)
    if not known:
        first = next(iter(sorted(target.iterdir())))
        raise _occupied(target, first.name, param)
    for path in entries:
        name = path.relative_to(target).as_posix()
        if path.is_symlink() or name not in known:
            raise _occupied(target, name, param)
    for folder in sorted(path for path in target.rglob("*") if path.is_dir()):
        name = folder.relative_to(target).as_posix()
        if not any(file.startswith(f"{name}/") for file in known):
            raise _occupied(target, f"{name}/", param)


def result_names(folder: Path) -> frozenset[str]:
    """Paths of the files of an earlier result in `folder`; empty where no manifest lists them."""
    try:
        return frozenset({*read_manifest(folder).files, MANIFEST_NAME, SUMS_NAME})
    except FormatError:
        return frozenset()


def may_be_of_result(path: str) -> bool:
    """Whether a result or an export of the library's own formats may hold a file of this path."""
    weights = "/" not in path and path.endswith((".safetensors", ".gguf"))
    return weights or path in _RESULT_FILES or is_companion(path)


def check_kept(target: Path, is_own: Callable[[str], bool], *, param: str) -> None:
    """Raise InputError where a folder holds an entry for whose name `is_own` is False."""
    _check_place(target, param, links=True)
    if not target.exists():
        return
    for path in sorted(target.iterdir()):
        if not is_own(path.name) and not is_temporary(path.name):
            raise _occupied(target, path.name, param)


def check_file(target: Path, is_own: Callable[[bytes], bool], *, param: str) -> None:
    """Raise InputError (code `output_exists`) unless a file can be written to `target`.

    is_own: whether what a file holds was written by Bitmill for the same purpose.
    """
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise _occupied(target, "something else of that name", param, whole=True)
    if target.exists() and not is_own(target.read_bytes()):
        raise _occupied(target, "a file of that name", param, whole=True)
    folder = target.absolute().parent
    if not folder.is_dir():
        raise InputError(
            f"{target} cannot be written: there is no folder {folder}; make it first",
            code="missing_folder",
            param=param,
        )
    _check_place(folder, param, links=True)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(at for at in (path, *path.absolute().parents) if at.exists())


def check_apart(folders: Mapping[str, Path | None]) -> None:
    """Raise InputError (code `overlapping_folders`) where two folders are one or lie in another.

    folders: by the word for each in messages; None for one that is not used.
    """
    real = {word: path.resolve() for word, path in folders.items() if path is not None}
    words = list(real)
    for i, first in enumerate(words):
        for second in words[i + 1 :]:
            a, b = real[first], real[second]
            if a != b and a not in b.parents and b not in a.parents:
                continue
            how = "is" if a == b else "lies in" if a in b.parents else "holds"
            raise InputError(
                f"{second} {folders[second]} {how} {first} {folders[first]}: choose folders apart "
                "from each other",
                code="overlapping_folders",
                param=second,
            )


def _check_place(target: Path, param: str, *, links: bool = False) -> None:
    """A folder can be made at `target`, or is there and can be written to."""
    if target.is_symlink() and not (links and target.is_dir()):
        raise _occupied(target, "a link of that name", param, whole=True)
    if target.exists() and not target.is_dir():
        raise _occupied(target, "a file of that name", param, whole=True)
    above = existing(target)
    if not above.is_dir():
        raise InputError(
            f"{target} cannot be a folder: {above} is a file", code="output_exists", param=param
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"{target} cannot be written: {above} does not allow it",
            code="not_writable",
            param=param,
        )


def _occupied(target: Path, what: str, param: str, *, whole: bool = False) -> InputError:
    problem = f"it holds {what}, which Bitmill did not write"
    if whole:
        problem = f"there is {what} already"
    return InputError(
        f"{target} is not replaced: {problem}; choose another name, or move that away",
        code="output_exists",
        param=param,
    )
