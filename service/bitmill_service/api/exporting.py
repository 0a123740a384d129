"""What is refused before an export of a finished job exists, and what it would take.

The packed folder's config, map and headers are read where they are stored, so the answer is that
of `bitmill export --dry-run`, without torch and without the weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bitmill.config.bit_width_map import MAP_NAME
from bitmill.errors import InputError
from bitmill.formats.export_plan import ExportPlan, ExportReport, ExportTarget
from bitmill.formats.headers import read_packed_headers
from bitmill.io.safetensors import INDEX_NAME
from bitmill.plan.config_json import CONFIG_FILE
from bitmill_service.api.context import Context, require_success
from bitmill_service.api.hub_headers import write_header
from bitmill_service.http.problems import ProblemError
from bitmill_workers.store.records import Artifact, JobRecord

_WHOLE = (CONFIG_FILE, MAP_NAME, INDEX_NAME)


def require_packed(job: JobRecord) -> None:
    """Raise a refusal unless the job has a packed folder, its files still there."""
    if job.kind != "quantize":
        raise InputError(
            f"job {job.id} is of kind {job.kind!r}: only the result of a quantization can be used",
            code="not_packed",
            param="job_id",
            hint="Name the job that `parent_id` names.",
        )
    require_success(job)


def plan_export(context: Context, job: JobRecord, target: ExportTarget) -> ExportReport | None:
    """What would be written; None where only the runner can tell, for a format of a package that
    reads no headers by itself.

    Raises `SpecError` (format_refuses) for what the target has no place for, and what
    `require_packed` raises.
    """
    require_packed(job)
    with tempfile.TemporaryDirectory(prefix="bitmill-export-") as scratch:
        folder = Path(scratch, job.id)  # errors name it
        folder.mkdir()
        try:
            for file in context.jobs.artifacts(job.id):
                _write_head(context, file, folder)
        except FileNotFoundError as error:
            raise ProblemError(
                "file_missing", f"a file of job {job.id} is no longer stored"
            ) from error
        stored = read_packed_headers(folder)
        return None if stored is None else ExportPlan.of(folder, target.chosen, stored).report()


def _write_head(context: Context, file: Artifact, folder: Path) -> None:
    if file.path in _WHOLE:
        (folder / file.path).write_bytes(context.artifacts.read(file))
    elif file.path.endswith(".safetensors"):

        def part(start: int, end: int) -> tuple[bytes, int]:
            return context.artifacts.read_part(file, start, end), file.size

        write_header(file.path, folder / file.path, part)
