"""Whether what learning gained on the calibration text holds for other text. Torch-free.

    change = exp(mean over blocks of ln(error after / error before)) - 1

Errors of a block are measured on held-out windows of the calibration text, which choose what is
kept, and on windows of other texts, which choose nothing (`watched_texts.py`). Before is the first
solution of the block, GPTQ's where learning starts from it, after what was kept, both on the
same inputs. Tuned scales are judged by KL likewise. A gain on the held-out windows that is none on
another text is overfitting, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bitmill.quality import BlockQuality, TuningQuality

ADVICE = "calibrate on text closer to the intended use, or on more sequences"


def mean_change(pairs: Sequence[tuple[float, float]]) -> float:
    """Geometric mean of after / before, less 1; a pair with an error of 0 counts as unchanged."""
    logs = [math.log(after / before) for before, after in pairs if before > 0 and after > 0]
    return math.expm1(sum(logs) / len(pairs)) if pairs else 0.0


def held_out_change(blocks: Sequence[BlockQuality]) -> float:
    """Mean change of the block errors on the held-out calibration text."""
    return mean_change([(block.loss_before, block.loss_after) for block in blocks])


def text_changes(blocks: Sequence[BlockQuality]) -> dict[str, float]:
    """Mean change of the block errors on every other text."""
    names = dict.fromkeys(name for block in blocks for name in block.texts)
    return {
        name: mean_change([block.texts[name] for block in blocks if name in block.texts])
        for name in names
    }


def overfitting_warnings(
    blocks: Sequence[BlockQuality], tuning: TuningQuality | None
) -> tuple[str, ...]:
    """One sentence for each text on which learning, or tuning, gained nothing."""
    gained = held_out_change(blocks)
    found = [
        f"learning lowered the block errors on the calibration text by {-gained:.1%} on average, "
        f"but not on {name} ({change:+.1%}): it overfits; {ADVICE}"
        for name, change in text_changes(blocks).items()
        if gained < 0 <= change
    ]
    if tuning is not None and tuning.kept:
        found += [
            f"tuning the scales lowered the KL on the calibration text from {tuning.kl_before:.4g} "
            f"to {tuning.kl_after:.4g}, but not on {name} ({before:.4g} to {after:.4g}): it "
            f"overfits; {ADVICE}"
            for name, (before, after) in tuning.texts.items()
            if after >= before
        ]
    return tuple(found)
