"""Stages that jobs of one sweep make once though their machines share no disk.

A runner has no database. It says that it wants to make a stage, and its supervisor answers with an
empty file of the stage's name in the attempt's folder `turns`, once the lease of the stage is the
job's or another job's result has been fetched:

    runner  -> {"type": "turn", "stage": NAME, "state": "wanted"}      (message pipe)
    supervisor: `SweepStore.take_stage`; fetches what was made -> turns/NAME
    runner  -> {"type": "turn", "stage": NAME, "state": "made"}
    supervisor: stores the folder, `SweepStore.stage_made`

A lease is worth as much as that of the job that has it: when its worker dies, another takes over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitmill_workers.execution.child import Emit
from bitmill_workers.storage.artifacts import STAGES, ArtifactStore
from bitmill_workers.store.records import JobRecord
from bitmill_workers.store.sweeps import SweepStore


class RunnerTurns:
    """The runner's side, which the pipeline asks (`pipeline/workspace.py`)."""

    def __init__(self, emit: Emit, folder: Path) -> None:
        self._emit, self._folder = emit, folder
        self._asked: set[str] = set()

    def take(self, stage: str) -> bool:
        """Whether the wait is over: the stage is there now, or is this job's to make."""
        if stage not in self._asked:
            self._asked.add(stage)
            self._emit({"type": "turn", "stage": stage, "state": "wanted"})
        return (self._folder / stage).exists()

    def made(self, stage: str) -> None:
        """This job has made it."""
        self._emit({"type": "turn", "stage": stage, "state": "made"})


class SupervisorTurns:
    """The supervisor's side, for one attempt. shared: the sweep's stages on this machine."""

    def __init__(
        self,
        sweeps: SweepStore,
        artifacts: ArtifactStore,
        job: JobRecord,
        shared: Path,
        folder: Path,
    ) -> None:
        self._sweeps, self._artifacts, self._job = sweeps, artifacts, job
        self._shared, self._folder = shared, folder
        self._wanted: list[str] = []
        self._made: list[str] = []

    def message(self, message: dict[str, Any]) -> None:
        """Take one message of the runner; `tick` acts on it."""
        waiting = self._wanted if message["state"] == "wanted" else self._made
        waiting.append(str(message["stage"]))

    def settle(self) -> bool:
        """Store what a runner that has ended made last; True, always."""
        self._wanted.clear()
        self.tick()
        return True

    def tick(self) -> None:
        """Hand out what is free and store what was made; may raise what database and store do."""
        sweep, key = str(self._job.sweep_id), (self._job.id, self._job.token)
        while self._made:
            stage = self._made[0]
            self._artifacts.share_folder(STAGES, f"{sweep}/{stage}", self._shared / stage)
            self._sweeps.stage_made(sweep, stage, *key)
            self._made.pop(0)
        for stage in list(self._wanted):
            state = self._sweeps.take_stage(sweep, stage, *key)
            if state == "wait":
                continue
            if state == "made":
                self._artifacts.fetch_folder(STAGES, f"{sweep}/{stage}", self._shared / stage)
            self._folder.mkdir(exist_ok=True)
            (self._folder / stage).touch()
            self._wanted.remove(stage)
