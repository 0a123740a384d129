"""What a bit-width map loses in fact: refined as the job will, and measured on held-out windows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.evaluation.compare import Candidate, measure, with_weights
from bitmill.evaluation.count import Count, windows_read
from bitmill.io.atomic import read_json, write_json
from bitmill.pipeline.stage import Run
from bitmill.pipeline.stages import refine
from bitmill.refinement.model import RefinedModel


def refined_loss(
    refining: refine.Inputs,
    bit_widths: BitWidthMap,
    run: Run,
    scratch: Path,
    wanted: Callable[[float, float], bool] = lambda *_: False,
) -> tuple[float, float]:
    """Mean KL of a map on the held-out windows, and its standard error.

    refining: how any map is refined; its own is not used. wanted: told both, says whether the
    refined blocks are kept for stage `refine`. Goes on in `scratch` behind the last
    block that a killed run saved, and takes what was measured.
    """
    record = scratch / "loss.json"
    if run.group.broadcast(record.is_file()):
        kl, kl_se = read_json(record)
        return kl, kl_se
    refining = replace(refining, bit_widths=bit_widths)
    kl, kl_se = _loss(refining, run, scratch)
    blocks = _blocks(scratch)
    if run.group.first:
        if refining.kept is not None and wanted(kl, kl_se):
            refining.kept.keep(blocks, refine.STAGE.digest(refining))
        else:
            shutil.rmtree(blocks)
        write_json(record, [kl, kl_se])
    run.group.barrier()
    return kl, kl_se


def first_loss(
    refining: refine.Inputs, bit_widths: BitWidthMap, run: Run, scratch: Path, blocks: int
) -> tuple[float, float]:
    """`refined_loss` of the first so many blocks in an otherwise float model.

    They stay in `scratch`, where `refined_loss` of that map goes on behind them.
    """
    return _loss(replace(refining, bit_widths=bit_widths), run, scratch, blocks)


def _blocks(scratch: Path) -> Path:
    return scratch / "blocks"


def _loss(
    refining: refine.Inputs, run: Run, scratch: Path, count: int | None = None
) -> tuple[float, float]:
    blocks = _blocks(scratch)
    blocks.mkdir(parents=True, exist_ok=True)  # any rank may come first
    refine.work(refining, run, blocks, blocks=count)
    plan = refining.plan
    model = run.open_model(refining.model.folder, plan)
    refined = RefinedModel(blocks, plan, count)
    logits = with_weights(
        model, lambda name: refined.linear(name).dequantize(), refined.changed, blocks=count
    )
    candidates = {"map": Candidate(refining.bit_widths, logits, plan)}
    windows = {"held_out": refining.calibration.held_out}
    told = Count(run.on_unit, windows_read(windows, 2, run.group))
    rows = measure(model, windows, candidates, told, group=run.group)
    quality = rows[1].texts["held_out"]
    run.group.barrier()
    return quality.kl, quality.kl_se
