"""Reports of learning that the tests of their tables share."""

from __future__ import annotations

from bitmill.results import TuningQuality


def tuning_quality(other: float) -> TuningQuality:
    """Tuned scales that were kept; other: KL on the handbook text, 0.4 before."""
    return TuningQuality(
        kl_before=0.3,
        kl_after=0.25,
        kept=True,
        texts={"handbook_evaluation": (0.4, other)},
        seconds=7,
        steps=20,
        best_step=15,
        rollbacks=0,
        gave_up=False,
    )
