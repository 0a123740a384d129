"""The job directory: one folder per finished stage, skipped while its inputs are the same.

A stage works in a hidden folder `.partial-<stage>` that carries the hash of its inputs; when it
ends, the folder is flushed and renamed to the stage's name. A killed run leaves the hidden folder:
the next run with the same inputs goes on in it (long stages keep one file per finished decoder
block there), a run with other inputs starts it anew.

Where several ranks run the job, the first decides and writes; the others wait for it, and work in
stages that are `shared`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitmill.errors import Cancelled
from bitmill.io.atomic import disk_errors, publish_folder, read_json, sha256_json, write_json
from bitmill.pipeline.progress import Progress, Stage
from bitmill.runtime.ranks import SINGLE, Group

STAGE_FILE = "stage.json"
_VERSION = 1


class Workspace:
    """A job directory and those who watch it.

    emit receives every `Progress`; should_stop is asked between units of work; both of the first
    rank alone.
    """

    def __init__(
        self,
        root: Path,
        emit: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        group: Group = SINGLE,
    ) -> None:
        self.root = root
        self.group = group
        self._emit = emit
        self._should_stop = should_stop

    def run(
        self,
        stage: Stage,
        inputs: Mapping[str, Any],
        work: Callable[[Path], None],
        *,
        shared: bool = False,
    ) -> Path:
        """The folder of this stage, made by `work(folder)` unless it exists for these inputs.

        inputs: JSON values that determine the result. shared: all ranks do the work.
        """
        digest = sha256_json({"stage": stage, "version": _VERSION, "inputs": dict(inputs)})
        folder, partial = self.root / stage, self.root / f".partial-{stage}"
        if self.group.broadcast(_is_made_from(folder, digest)):
            self._tell(Progress(kind="stage", stage=stage, state="skipped"))
            return folder
        self.check_stop()
        self._tell(Progress(kind="stage", stage=stage, state="started"))
        with disk_errors(folder):
            begin = time.monotonic()
            if self.group.first:
                _prepare(partial, digest)
            self.group.barrier()
            if shared or self.group.first:
                work(partial)
            self.group.barrier()
            if self.group.first:
                spent = read_json(partial / STAGE_FILE)["seconds"] + time.monotonic() - begin
                write_json(partial / STAGE_FILE, {"digest": digest, "seconds": round(spent, 3)})
                publish_folder(partial, folder)
            self.group.barrier()
        self._tell(Progress(kind="stage", stage=stage, state="finished"))
        return folder

    def forget(self, stage: Stage) -> None:
        """Have a stage run again, because what it made elsewhere is gone."""
        if self.group.first:
            shutil.rmtree(self.root / stage, ignore_errors=True)

    def _tell(self, progress: Progress) -> None:
        if self.group.first:
            self._emit(progress)

    def unit(self, stage: Stage, done: int, total: int, unit: str, message: str = "") -> None:
        """Report that `done` of `total` units are finished; raises `Cancelled` if asked to stop."""
        self._tell(
            Progress(
                kind="progress",
                stage=stage,
                done=done,
                total=total,
                unit=unit,
                message=message or None,
            )
        )
        self.check_stop()

    def warn(self, stage: Stage, message: str) -> None:
        """Report something the user should know."""
        self._tell(Progress(kind="warning", stage=stage, message=message))

    def check_stop(self) -> None:
        """Raise `Cancelled` if the job was asked to stop."""
        if self.group.first and self._should_stop():
            raise Cancelled("the job was asked to stop")

    def seconds(self) -> dict[str, float]:
        """Wall time of every finished stage."""
        files = sorted(self.root.glob(f"[!.]*/{STAGE_FILE}"))
        return {file.parent.name: read_json(file)["seconds"] for file in files}


def _prepare(partial: Path, digest: str) -> None:
    """The folder to work in: that of a killed run with the same inputs, or a new one."""
    if not _is_made_from(partial, digest):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(partial / STAGE_FILE, {"digest": digest, "seconds": 0.0})


def _is_made_from(folder: Path, digest: str) -> bool:
    file = folder / STAGE_FILE
    return file.is_file() and read_json(file)["digest"] == digest
