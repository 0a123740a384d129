"""What a running job tells its watcher."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

StageName = Literal[
    "resolve", "plan", "profile", "allocate", "refine", "pack", "verify", "evaluate", "publish"
]
STAGES: tuple[StageName, ...] = get_args(StageName)


class Progress(BaseModel):
    """One event of a running job.

    kind: "stage" (a stage started, was skipped or finished: `state`), "progress" (done of total
    units within the stage), "warning" (message).
    unit: what done and total count, e.g. "block", "window".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["stage", "progress", "warning"]
    stage: StageName
    state: Literal["started", "skipped", "finished"] | None = None
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    message: str | None = None
