"""The state machine of a job.

    queued -> running -> finalizing -> succeeded
    running, finalizing -> queued       worker lost, or handed back
    running, finalizing -> failed       error, attempts used up, deadline passed
    queued -> failed                    deadline passed before a worker was free
    queued, running -> cancelled        a running job shows `cancelling` until its runner is gone
    finalizing -> cancelled             only when the worker was lost after the cancel was asked

Terminal states never change. Every edge is one conditional UPDATE with an event in the same
transaction (`bitmill_workers.store.transitions`).
"""

from __future__ import annotations

from typing import Final, Literal

State = Literal["queued", "running", "finalizing", "succeeded", "failed", "cancelled"]
ShownState = Literal[
    "queued", "running", "cancelling", "finalizing", "succeeded", "failed", "cancelled"
]

STATES: Final[tuple[State, ...]] = (
    "queued",
    "running",
    "finalizing",
    "succeeded",
    "failed",
    "cancelled",
)
ACTIVE: Final[frozenset[State]] = frozenset({"running", "finalizing"})
TERMINAL: Final[frozenset[State]] = frozenset({"succeeded", "failed", "cancelled"})

TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    "queued": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"finalizing", "queued", "failed", "cancelled"}),
    "finalizing": frozenset({"succeeded", "queued", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}


def sources_of(target: State) -> frozenset[State]:
    """States from which `target` may be entered."""
    return frozenset(s for s, targets in TRANSITIONS.items() if target in targets)


def shown_state(state: State, cancel_requested: bool) -> ShownState:
    """The state as clients see it."""
    return "cancelling" if cancel_requested and state in ACTIVE else state
