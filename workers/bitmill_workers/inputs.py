"""Everything outside the specification that a job needs, turned into local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitmill.errors import CalibrationError, InputError
from bitmill.spec import FileText, JobMap, JobSpec, UploadedMap
from bitmill.storage import write_json
from bitmill_workers.artifacts import ArtifactStore
from bitmill_workers.catalog import Catalog
from bitmill_workers.fetch import resolve_path
from bitmill_workers.jobs import JobStore
from bitmill_workers.settings import Settings

MAP_FILE = "bit_width_map.json"


def local_spec(spec: JobSpec, settings: Settings) -> dict[str, Any]:
    """The specification as JSON with the calibration file's path below a root made absolute."""
    data = spec.model_dump(mode="json")
    text = spec.calibration.text
    if isinstance(text, FileText):
        place, _ = resolve_path(text.path, settings.model_roots)
        if not place.is_file():
            raise CalibrationError(
                f"there is no calibration file {text.path!r}",
                code="calibration_not_found",
                param="calibration.text.path",
            )
        data["calibration"]["text"]["path"] = str(place)
    return data


def write_map(
    spec: JobSpec, target: Path, store: JobStore, catalog: Catalog, artifacts: ArtifactStore
) -> Path | None:
    """Write the map that the specification refers to; None where it gives none or has it inline.

    Raises `InputError` (code `map_not_found`).
    """
    given = spec.allocation.map
    if isinstance(given, UploadedMap):
        record = catalog.map(given.map_id)
        if record is None:
            raise _no_map(f"no bit-width map {given.map_id!r} was uploaded")
        write_json(target, record.map)
        return target
    if isinstance(given, JobMap):
        artifact = store.artifact(given.job_id, MAP_FILE)
        if artifact is None:
            raise _no_map(f"job {given.job_id!r} has no bit-width map")
        target.write_bytes(artifacts.read(artifact))
        return target
    return None


def _no_map(problem: str) -> InputError:
    return InputError(problem, code="map_not_found", param="allocation.map")
