"""Finished jobs of models made of shapes alone: map, report, profile and its summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitmill.allocation.allocator import Allocator
from bitmill.config.quantization import Allocation, Budget
from bitmill.formats.accounting import footprint
from bitmill.plan.model_plan import Plan
from bitmill.reporting.summary import SUMMARY_NAME, summarize
from bitmill.results import LinearResult, QualityReport, QualityRow, TextQuality
from bitmill_workers.store.records import JobRecord
from finished import Stack
from plans import random_profile

WIDTHS = (2, 3, 4, 5, 6, 8)


def finish_model(
    stack: Stack, plan: Plan, bits: float = 3.2, *, measured: float = 1.0, **changes: Any
) -> JobRecord:
    """A job of a knapsack at so many bits; its KL is `measured` times the prediction."""
    profile = random_profile(plan, widths=WIDTHS, seed=plan.block_count)
    allocation = Allocation(order="natural")
    found = Allocator(plan, allocation, profile).knapsack(Budget(bits=bits))
    summary = summarize(plan, allocation, profile, found, points=2)
    assert summary is not None
    taken = footprint(plan, found)
    predicted = profile.predicted_loss(found.linears)
    row = QualityRow(
        method="knapsack, gptq",
        code_bits=taken.code_bits,
        bits=taken.bits,
        size=taken.size,
        predicted_loss=predicted,
        texts={"wiki": quality(kl=measured * predicted)},
    )
    errors = np.random.default_rng(0).lognormal(-4, 1, len(plan.shapes))
    report = QualityReport(
        rows=(QualityRow(method="source", texts={"wiki": quality(kl=0)}), row),
        linears=tuple(
            LinearResult(name=name, code_bits=float(np.mean(widths)), relative_error=float(error))
            for (name, widths), error in zip(found.linears.items(), errors, strict=True)
        ),
    )
    files: Mapping[str, str] = {
        "bit_width_map.json": found.to_json(),
        "quality.json": report.to_json(),
        SUMMARY_NAME: summary.to_json(),
    }
    spec = {"budget": {"bits": bits}, "allocation": {"method": "knapsack", "order": "natural"}}
    return stack.finish(
        stack.running(**spec | changes),
        others=files,
        profile=stack.profile(plan, profile),
        result={"quality": report.model_dump(mode="json")},
    )


def quality(kl: float) -> TextQuality:
    """What a text might measure with this KL, nats per token."""
    return TextQuality(
        windows=8,
        tokens=4096,
        perplexity=20 * float(np.exp(kl)),
        perplexity_se=1.5,
        kl=kl,
        kl_se=0.02 * kl,
        loss_increase=kl,
        loss_increase_se=0.02 * kl,
    )
