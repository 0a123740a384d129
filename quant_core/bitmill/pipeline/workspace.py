"""The job directory: one folder per finished stage, skipped while its inputs are the same.

A stage works in a hidden folder `.partial-<stage>` that carries the hash of its inputs; when it
ends, the folder is flushed and renamed to the stage's name. A killed run leaves the hidden folder:
the next run with the same inputs goes on in it (long stages keep one file per finished decoder
block there), a run with other inputs starts it anew.

Jobs of one sweep work in a folder that they share: a stage lies there under its name and digest, so
that equal stages of different jobs are made once, by whichever comes first; another that comes
meanwhile waits, and goes on behind the last finished block where the first one was killed.

Where several ranks run the job, the first decides and writes; the others wait for it, and work in
stages that are `shared`.
"""

from __future__ import annotations

import fcntl
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TextIO, TypeVar

import torch

from bitmill.errors import Cancelled
from bitmill.io.atomic import disk_errors, publish_folder, read_json, write_json
from bitmill.pipeline.progress import Progress, StageName
from bitmill.pipeline.stage import Run, Stage
from bitmill.pipeline.work_folder import HIDDEN, LOCK, STAGE_FILE
from bitmill.runtime.ranks import SINGLE, Ranks

Inputs = TypeVar("Inputs")

_POLL_S = 0.2
_TELL_S = 30.0
"""How often a job that waits for another says so: a silent one would be taken for stuck."""
_ANSWER_S = 5.0
"""A question about a turn may take this long to be answered."""


@dataclass(frozen=True)
class Made:
    """The folder of a stage. id: of this making; a folder that was lost and made again has another.

    As an input of a later stage it counts by its id, which stands for all that lies in the folder.
    """

    folder: Path = field(compare=False)
    id: str


class Turns(Protocol):
    """Which job makes a stage where those of a sweep have folders of their own."""

    def take(self, stage: str) -> bool:
        """Whether the wait is over: the stage is there now, or is this job's to make."""

    def made(self, stage: str) -> None:
        """This job has made it."""


class Workspace:
    """A job directory and those who watch it.

    emit receives every `Progress`; should_stop is asked between units of work; both of the first
    rank alone. device: where stages compute. shared: folder in which equal stages of several jobs
    are made once; None for a job by itself. turns: asked before a stage that travels is made there.
    """

    def __init__(
        self,
        root: Path,
        emit: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        group: Ranks = SINGLE,
        device: torch.device | None = None,
        shared: Path | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.root = root
        self.shared = shared
        self.turns = turns
        self.group = group
        self.device = device or torch.device("cpu")
        self._emit = emit
        self._should_stop = should_stop
        self._seconds: dict[str, float] = {}

    def run(self, stage: Stage[Inputs], inputs: Inputs) -> Made:
        """The folder of this stage, made by its work unless it exists for these inputs."""
        name, digest = stage.name, stage.digest(inputs)
        folder = self._place(name, digest)
        with self._turn(stage, folder, digest):
            if self.group.broadcast(_is_made_from(folder, digest)):
                self._tell(Progress(kind="stage", stage=name, state="skipped"))
            else:
                self._make(stage, inputs, digest, folder)
        return self._made(name, folder)

    def _make(self, stage: Stage[Inputs], inputs: Inputs, digest: str, folder: Path) -> None:
        name, hidden = stage.name, folder.with_name(f"{HIDDEN}{folder.name}")
        self.check_stop()
        self._tell(Progress(kind="stage", stage=name, state="started"))
        with disk_errors(folder):
            begin = time.monotonic()
            if self.group.first:
                _prepare(hidden, digest)
            self.group.barrier()
            if stage.shared or self.group.first:
                stage.work(inputs, self._watched(name), hidden)
            self.group.barrier()
            if self.group.first:
                record = read_json(hidden / STAGE_FILE)
                spent = record["seconds"] + time.monotonic() - begin
                write_json(hidden / STAGE_FILE, record | {"seconds": round(spent, 3)})
                publish_folder(hidden, folder)
            self.group.barrier()
        self._tell(Progress(kind="stage", stage=name, state="finished"))

    def _place(self, name: StageName, digest: str) -> Path:
        """Where a stage's folder is; what a job publishes is its own."""
        if self.shared is None or name == "publish":
            return self.root / name
        return self.shared / f"{name}-{digest}"

    @contextmanager
    def _turn(self, stage: Stage[Inputs], folder: Path, digest: str) -> Iterator[None]:
        """Hold a shared stage against the other jobs, which the end of this process frees too."""
        if folder.parent != self.shared or not self.group.first:
            yield
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{LOCK}{folder.name}").open("w") as handle:
            self._wait(stage.name, lambda: _locked(handle))
            turns = self.turns if stage.travels else None
            if turns is None or _is_made_from(folder, digest):
                yield
                return
            self._wait(stage.name, lambda: turns.take(folder.name), quiet_s=_ANSWER_S)
            makes = not _is_made_from(folder, digest)
            yield
            if makes:
                turns.made(folder.name)

    def _wait(self, name: StageName, over: Callable[[], bool], quiet_s: float = 0.0) -> None:
        """Until another job has made a stage. quiet_s: a wait so long means nothing."""
        told = time.monotonic() - _TELL_S + quiet_s
        while not over():
            if time.monotonic() - told >= _TELL_S:
                told = time.monotonic()
                self.unit(name, 0, 1, "stage", "made by another job of the sweep")
            self.check_stop()
            time.sleep(_POLL_S)

    def _watched(self, name: StageName) -> Run:
        return Run(
            device=self.device,
            group=self.group,
            on_unit=partial(self.unit, name),
            warn=partial(self.warn, name),
            seconds=self.seconds,
        )

    def _made(self, name: StageName, folder: Path) -> Made:
        record = read_json(folder / STAGE_FILE)
        self._seconds[name] = record["seconds"]
        return Made(folder, record["id"])

    def forget(self, stage: StageName) -> None:
        """Have a stage run again, because what it made elsewhere is gone."""
        if self.group.first:
            shutil.rmtree(self.root / stage, ignore_errors=True)

    def _tell(self, progress: Progress) -> None:
        if self.group.first:
            self._emit(progress)

    def unit(self, stage: StageName, done: int, total: int, unit: str, message: str = "") -> None:
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

    def warn(self, stage: StageName, message: str) -> None:
        """Report something the user should know."""
        self._tell(Progress(kind="warning", stage=stage, message=message))

    def check_stop(self) -> None:
        """Raise `Cancelled` if the job was asked to stop."""
        if self.group.first and self._should_stop():
            raise Cancelled("the job was asked to stop")

    def seconds(self) -> dict[str, float]:
        """Wall time of every stage that this run has come to, by name in alphabetical order."""
        return dict(sorted(self._seconds.items()))


def _prepare(hidden: Path, digest: str) -> None:
    """The folder to work in: that of a killed run with the same inputs, or a new one."""
    if not _is_made_from(hidden, digest):
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        made = {"digest": digest, "id": uuid.uuid4().hex, "seconds": 0.0}
        write_json(hidden / STAGE_FILE, made)


def _is_made_from(folder: Path, digest: str) -> bool:
    file = folder / STAGE_FILE
    return file.is_file() and read_json(file)["digest"] == digest


def _locked(handle: TextIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
