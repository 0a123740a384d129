"""What learning changed, and whether that holds for other text than calibration's. Torch-free.

    change = exp(mean over blocks of ln(error after / error before)) - 1

Errors of a block are measured on held-out windows of the calibration text, which choose what is
kept, and on windows of other texts, which choose nothing (`refinement/omniquant/watched_texts.py`).
Before is the first solution of the block, GPTQ's where learning starts from it, after what was
kept, both on the same inputs. Tuned scales are judged by KL likewise. Where another text gains less
than a tenth of what the held-out windows do (of the logarithm), the report says that learning
overfits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bitmill.results import BlockQuality, TuningQuality

WORTH = 0.1
"""Share of the gain on held-out text below which another text has not gained."""

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


def learning_summary(
    blocks: Sequence[BlockQuality], tuning: TuningQuality | None, *, resumed: bool
) -> tuple[str, ...]:
    """Lines of plain text: what learning and tuning changed; none where nothing learned."""
    if not blocks:
        return ()
    lines = ["learned by an earlier job; nothing was trained"] if resumed else []
    changes = {"held-out": held_out_change(blocks), **text_changes(blocks)}
    learned = sum(block.kept == "learned" for block in blocks)
    lines.append(
        f"learned {learned} of {len(blocks)} blocks in {sum(b.seconds for b in blocks):,.1f} s; "
        f"mean change of block errors: {', '.join(f'{n} {c:+.1%}' for n, c in changes.items())}"
    )
    if tuning is not None:
        pairs = {"held-out": (tuning.kl_before, tuning.kl_after), **tuning.texts}
        kls = ", ".join(f"{name} {a:.4g} to {b:.4g}" for name, (a, b) in pairs.items())
        kept = "kept" if tuning.kept else "not kept"
        lines.append(f"tuned all scales in {tuning.seconds:,.1f} s, {kept}; KL: {kls}")
    return tuple(lines)


def overfitting_warnings(
    blocks: Sequence[BlockQuality], tuning: TuningQuality | None
) -> tuple[str, ...]:
    """One sentence for each text on which learning, or tuning, gained nothing worth the name."""
    what = "learning lowered the block errors"
    found = _warnings(what, held_out_change(blocks), text_changes(blocks))
    if tuning is not None:
        changes = {name: mean_change([pair]) for name, pair in tuning.texts.items()}
        gained = mean_change([(tuning.kl_before, tuning.kl_after)])
        found += _warnings("tuning the scales lowered the KL", gained, changes)
    return tuple(found)


def _warnings(what: str, gained: float, changes: Mapping[str, float]) -> list[str]:
    least = WORTH * math.log1p(gained)
    return [
        f"{what} on held-out calibration text by {-gained:.1%}, and on {name} by "
        f"{-change:.2%}: it overfits; {ADVICE}"
        for name, change in changes.items()
        if gained < 0 and math.log1p(change) > least
    ]
