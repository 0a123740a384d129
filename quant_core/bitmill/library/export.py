"""`export`: a packed folder in the format of another runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bitmill.formats.export_plan import ExportReport
from bitmill.formats.format import parse_format
from bitmill.library.progress import Watcher, watching
from bitmill.pipeline.export import Export
from bitmill.pipeline.progress import Progress
from bitmill.runtime.process import computing


def export(
    packed: str | os.PathLike[str],
    format: str,
    *,
    out: str | os.PathLike[str],
    progress: Watcher | bool | None = None,
    **settings: Any,
) -> ExportReport:
    """Write a packed folder in a format (docs/exports.md), verified before it appears at `out`.

    settings: of the format, by name. Raises `SpecError` naming an unknown format, a setting that
    it does not have or take and those that it has, and all that it has no place for; `InputError`
    for a folder that may not be replaced.
    """

    def on_linear(done: int, total: int) -> None:
        watch(Progress(kind="progress", stage="pack", done=done, total=total, unit="linear"))

    chosen = parse_format(format, settings)
    with computing(), watching(progress) as watch:
        return Export.of(Path(packed), chosen).write(Path(out), on_linear)
