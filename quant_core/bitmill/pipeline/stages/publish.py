"""Stage `publish`: the packed folder with its reports and manifest; it appears whole."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.made_for import MADE_FOR_NAME, MadeFor
from bitmill.config.quantization import Allocation
from bitmill.io.atomic import atomic_folder, read_json, sha256_file, write_bytes, write_json
from bitmill.io.manifest import MANIFEST_NAME, write_manifest
from bitmill.io.targets import check_result
from bitmill.pipeline.learned_parameters import RECORD_NAME, LearnedFor
from bitmill.pipeline.stage import Run, Stage
from bitmill.pipeline.stages.pack import PACKED_NAME
from bitmill.pipeline.workspace import Made
from bitmill.plan.model_plan import Plan
from bitmill.reporting.summary import SUMMARY_NAME, summarize
from bitmill.results import QUALITY_NAME, QualityReport

_PUBLISHED_NAME = "published.json"


@dataclass(frozen=True)
class Profiled:
    """What the summary of a profile is made from; id: the profile's, which it names."""

    id: str
    profile: SensitivityProfile
    plan: Plan
    allocation: Allocation
    bit_widths: BitWidthMap

    @classmethod
    def of(
        cls,
        profile: SensitivityProfile | None,
        plan: Plan,
        allocation: Allocation,
        bit_widths: BitWidthMap,
    ) -> Profiled | None:
        """None where there is no profile that says what widths cost."""
        if profile is None or not profile.widths:
            return None
        return cls(profile.key, profile, plan, allocation, bit_widths)


@dataclass(frozen=True)
class Inputs:
    """output: where the folder appears. learned_for: goes with it where parameters were learned.
    made_for: the model that its map was made for, where that is known."""

    output: str
    packed: Made
    quality: QualityReport
    profiled: Profiled | None
    learned_for: LearnedFor | None
    made_for: MadeFor | None


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Replaces what an earlier run published, and nothing else (`check_result`)."""
    output = Path(inputs.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output, check_result) as made:
        packed = inputs.packed.folder / PACKED_NAME
        shutil.copytree(packed, made, copy_function=_link_or_copy, dirs_exist_ok=True)
        write_bytes(made / QUALITY_NAME, inputs.quality.to_json().encode())
        if inputs.profiled is not None:
            _write_summary(inputs.profiled, made / SUMMARY_NAME)
        if inputs.learned_for is not None:
            write_json(made / RECORD_NAME, inputs.learned_for.model_dump(mode="json"))
        if inputs.made_for is not None:
            write_bytes(made / MADE_FOR_NAME, inputs.made_for.to_json().encode())
        write_manifest(made)
    write_json(folder / _PUBLISHED_NAME, {"manifest": sha256_file(output / MANIFEST_NAME)})


STAGE = Stage("publish", work)


def is_there(folder: Path, output: Path) -> bool:
    """Whether the output is still the one that the stage, whose folder this is, published."""
    record, manifest = folder / _PUBLISHED_NAME, output / MANIFEST_NAME
    if not (record.is_file() and manifest.is_file()):
        return False
    same: bool = read_json(record)["manifest"] == sha256_file(manifest)
    return same


def _write_summary(profiled: Profiled, target: Path) -> None:
    summary = summarize(profiled.plan, profiled.allocation, profiled.profile, profiled.bit_widths)
    if summary is not None:
        write_bytes(target, summary.to_json().encode())


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
