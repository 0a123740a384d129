"""Where a job keeps its finished stages: a folder that was named, or one beside its result.

The latter is called `.NAME.bitmill-work` and is gone behind the job, unless the machine or the
program failed: then the error says where it lies. The next job with the same result goes on there,
as it does where a crash left it. Torch-free.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitmill.errors import BitmillError, InputError, ProcessFailed, ResourceError
from bitmill.io.atomic import beside
from bitmill.io.targets import check_kept, check_result, existing
from bitmill.pipeline.progress import STAGES

STAGE_FILE = "stage.json"
"""The record of a stage in its folder, which bears its name, behind `HIDDEN` while it is made."""
WEIGHTS_FOLDER = "loss-weights"
"""Where a profile leaves the weights of tokens and rows for refinement."""
FORMER_WEIGHTS_FOLDER = "token-weights"
"""Its name in earlier versions, whose jobs may go on; what lies there is not read."""
BLOCKS_FOLDER = "refined-blocks"
"""Where a search for the map leaves its blocks for refinement."""
HIDDEN = ".partial-"
LOCK = ".lock-"


def is_of_a_workspace(name: str) -> bool:
    """Whether a folder of finished stages has entries of this name."""
    kept = (WEIGHTS_FOLDER, FORMER_WEIGHTS_FOLDER, BLOCKS_FOLDER)
    return name.removeprefix(HIDDEN) in STAGES or name in kept


def is_of_shared_stages(name: str) -> bool:
    """Whether a folder of stages that several jobs share has entries of this name."""
    stage, _, digest = name.removeprefix(HIDDEN).removeprefix(LOCK).partition("-")
    return stage in STAGES and bool(re.fullmatch(r"[0-9a-f]{64}", digest))


@contextmanager
def work_folder(target: Path, named: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder for the stages of a job whose result is `target`: `named`, or one near it.

    Raises what `check_result` raises, and `InputError` where another job is at work on the same
    result. Nothing else is made: no folder above `target` either.
    """
    check_result(target)
    if named is not None:
        with _told(Path(named)):
            yield Path(named)
        return
    place = Path(os.path.abspath(target))
    folder = beside(existing(place.parent) / place.name, ".bitmill-work")
    check_kept(folder, is_of_a_workspace, param="out")
    folder.mkdir(exist_ok=True)
    kept = False
    with _held(folder, target):
        try:
            with _told(folder):
                yield folder
        except BitmillError as error:
            kept = _goes_on(error, folder)
            raise
        finally:
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path, target: Path) -> Iterator[None]:
    """Hold a folder against other jobs until the block or this process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another job is making {target}: wait for it, or choose another folder",
                code="folder_in_use",
                param="out",
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Errors behind which a job can go on say where."""
    try:
        yield
    except BitmillError as error:
        if _goes_on(error, folder):
            error.add(f"finished stages are kept in {folder}: the same job goes on there")
        raise


def _goes_on(error: BitmillError, folder: Path) -> bool:
    """Whether the machine or the program failed, with something done before.

    A command's own error stands for the one that it was raised from.
    """
    reason = error.__cause__ if isinstance(error.__cause__, BitmillError) else error
    passing = isinstance(reason, ResourceError | ProcessFailed)
    return passing and any(folder.glob(f"*/{STAGE_FILE}"))
