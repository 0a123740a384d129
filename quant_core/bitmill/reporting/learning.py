"""What a report says of learned refinement, as HTML and as text. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bitmill.reporting.overfitting import held_out_change, text_changes
from bitmill.results import BlockQuality, QualityReport, TuningQuality


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


def learning_section(report: QualityReport) -> str:
    """HTML section with a row per block and the tuning of scales; empty where nothing learned."""
    if not report.blocks:
        return ""
    changes = text_changes(report.blocks)
    heads = [
        "block",
        "kept",
        "error before",
        "error after",
        "change",
        *(f"change on {escape(name)}" for name in changes),
        "best of steps",
        "rollbacks",
        "seconds",
    ]
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    rows = "".join(_row(_cells(block, list(changes))) for block in report.blocks)
    mean = [f"{held_out_change(report.blocks):+.1%}", *(f"{c:+.1%}" for c in changes.values())]
    spent = f"{sum(block.seconds for block in report.blocks):,.1f}"
    total = _row(["mean change, sum of seconds", "", "", "", *mean, "", "", spent], ours=True)
    taken = (
        "<p>Learned by an earlier job, whose report this is; nothing was trained.</p>"
        if report.resumed
        else ""
    )
    return (
        f"<h2>Learning</h2>{taken}<p>Error of each block's output on held-out calibration text, "
        "with its first solution and with what was kept. The held-out text decided what is kept; "
        "the other texts decided nothing.</p><div class=scroll><table class=plain>"
        f"<caption>mode {escape(report.blocks[0].mode)}; means of changes are geometric</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}{total}</tbody></table></div>"
        f"{_tuning(report.tuning)}"
    )


def _cells(block: BlockQuality, texts: Sequence[str]) -> list[str]:
    pairs = [(block.loss_before, block.loss_after), *(block.texts[name] for name in texts)]
    changes = [f"{after / before - 1:+.1%}" if before > 0 else "" for before, after in pairs]
    return [
        str(block.index),
        block.kept,
        f"{block.loss_before:.4g}",
        f"{block.loss_after:.4g}",
        *changes,
        f"{block.best_step} of {block.steps}" + (", gave up" if block.gave_up else ""),
        str(block.rollbacks),
        f"{block.seconds:.1f}",
    ]


def _row(cells: Sequence[str], *, ours: bool = False) -> str:
    body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr{' class=ours' if ours else ''}>{body}</tr>"


def _tuning(tuning: TuningQuality | None) -> str:
    if tuning is None:
        return ""
    pairs = {"held-out calibration text": (tuning.kl_before, tuning.kl_after), **tuning.texts}
    rows = "".join(_row([name, f"{a:.4g}", f"{b:.4g}"]) for name, (a, b) in pairs.items())
    kept = "kept" if tuning.kept else "not kept"
    return (
        f"<p>All scales were then tuned together and {kept}: best of {tuning.steps} steps at "
        f"{tuning.best_step}, {tuning.rollbacks} rollbacks, {tuning.seconds:,.1f} seconds.</p>"
        "<table class=plain><thead><tr><th scope=col>KL, nats/token</th>"
        f"<th scope=col>before</th><th scope=col>after</th></tr></thead><tbody>{rows}</tbody>"
        "</table>"
    )
