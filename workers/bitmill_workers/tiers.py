"""Which queue a job waits in: the smallest accelerator that its plan fits on.

With `route_by_memory` off (the default, and the embedded service) everything waits in "cpu", which
every worker serves unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Collection

from bitmill.errors import ModelError
from bitmill_workers.settings import TIERS, Settings

_GB = 10**9
_USABLE = 0.92
"""Share of an accelerator's nominal memory that a job can count on."""


def tier_bytes(tier: str) -> int:
    """Bytes of accelerator memory that a job of this queue may use; 0 for "cpu"."""
    _, _, size = tier.partition("-")
    return int(int(size) * _GB * _USABLE) if size else 0


def choose_queue(accelerator_bytes: int, settings: Settings) -> str:
    """The queue of a job whose plan needs so much accelerator memory.

    Raises `ModelError` (code `too_large`) where no tier holds it.
    """
    if not settings.route_by_memory:
        return TIERS[0]
    for tier in TIERS[1:]:
        if accelerator_bytes <= tier_bytes(tier):
            return tier
    raise ModelError(
        f"the job needs {accelerator_bytes:,} bytes of accelerator memory, the largest tier has "
        f"{tier_bytes(TIERS[-1]):,}: use a shorter calibration.length",
        code="too_large",
        param="model",
    )


def largest_tier(queues: Collection[str]) -> str:
    """The largest accelerator among these queues; the smallest one there is where none is."""
    return next((tier for tier in reversed(TIERS[1:]) if tier in queues), TIERS[1])


def next_tier(queue: str) -> str | None:
    """The next larger accelerator; None above the largest."""
    larger = TIERS[TIERS.index(queue) + 1 :]
    return larger[0] if larger else None
