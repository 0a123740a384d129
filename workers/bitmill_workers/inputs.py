"""Everything outside the specification that a job needs: given maps and calibration files.

The API looks for them before it accepts a job, the supervisor turns them into local files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitmill.bits import BitWidthMap
from bitmill.errors import CalibrationError, InputError, ModelError
from bitmill.spec import FileText, InlineMap, JobSpec, UploadedMap
from bitmill.storage import write_bytes
from bitmill_workers.artifacts import ArtifactStore
from bitmill_workers.catalog import Catalog
from bitmill_workers.fetch import resolve_path
from bitmill_workers.jobs import JobStore
from bitmill_workers.settings import Settings

MAP_FILE = "bit_width_map.json"
_TEXT_PARAM = "calibration.text.path"


def calibration_file(text: FileText, settings: Settings) -> Path:
    """The file below an allowed root that holds the calibration text.

    Raises `CalibrationError` (codes `path_not_allowed`, `text_not_found`).
    """
    try:
        place, _ = resolve_path(text.path, settings.model_roots)
    except ModelError as error:
        raise CalibrationError(error.message, code=error.code, param=_TEXT_PARAM) from error
    if not place.is_file():
        raise CalibrationError(
            f"there is no calibration file {text.path!r}", code="text_not_found", param=_TEXT_PARAM
        )
    return place


def local_spec(spec: JobSpec, settings: Settings) -> dict[str, Any]:
    """The specification as JSON with the calibration file's path below a root made absolute."""
    data = spec.model_dump(mode="json")
    text = spec.calibration.text
    if isinstance(text, FileText):
        data["calibration"]["text"]["path"] = str(calibration_file(text, settings))
    return data


def given_map(
    spec: JobSpec, store: JobStore, catalog: Catalog, artifacts: ArtifactStore
) -> BitWidthMap | None:
    """The map that the specification holds or refers to; None where it gives none.

    Raises `InputError` (code `map_not_found`).
    """
    given = spec.allocation.map
    if given is None:
        return None
    if isinstance(given, InlineMap):
        return given.map
    if isinstance(given, UploadedMap):
        record = catalog.map(given.map_id)
        if record is None:
            raise _no_map(f"no bit-width map {given.map_id!r} was uploaded", "map_id")
        return BitWidthMap.model_validate(record.map)
    artifact = store.artifact(given.job_id, MAP_FILE)
    if artifact is None:
        raise _no_map(f"there is no succeeded job {given.job_id!r} with a bit-width map", "job_id")
    return BitWidthMap.model_validate_json(artifacts.read(artifact))


def write_map(
    spec: JobSpec, target: Path, store: JobStore, catalog: Catalog, artifacts: ArtifactStore
) -> Path | None:
    """Write the map that the specification refers to; None where it gives none or has it inline.

    Raises `InputError` (code `map_not_found`).
    """
    found = given_map(spec, store, catalog, artifacts)
    if found is None or isinstance(spec.allocation.map, InlineMap):
        return None
    write_bytes(target, found.to_json().encode())
    return target


def _no_map(problem: str, member: str) -> InputError:
    return InputError(problem, code="map_not_found", param=f"allocation.map.{member}")
