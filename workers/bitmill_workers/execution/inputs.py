"""What a job needs beside its specification: given maps, calibration files, learned parameters.

The API looks for them before it accepts a job, the supervisor turns them into local files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.made_for import MADE_FOR_NAME, MadeFor
from bitmill.config.quantization import FileText, QuantizationConfig
from bitmill.errors import CalibrationError, InputError, ModelError
from bitmill.pipeline.learned_parameters import PARAM, RECORD_NAME, LearnedFor
from bitmill_workers.execution.fetch import holds, resolve_path
from bitmill_workers.job_spec import (
    InlineMap,
    JobParameters,
    JobSpec,
    PathParameters,
    UploadedMap,
    UploadParameters,
)
from bitmill_workers.settings import Settings
from bitmill_workers.storage.artifacts import ArtifactStore
from bitmill_workers.storage.uploads import fetch_upload
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import Artifact

_WITHOUT = "there is no succeeded job {!r} with learned parameters"
_TEXT_PARAM = "calibration.text.path"


def calibration_file(text: FileText, settings: Settings) -> Path:
    """The file below an allowed root that holds the calibration text.

    Raises `CalibrationError` (codes `path_not_allowed`, `text_not_found`).
    """
    try:
        place, _ = resolve_path(text.path, settings.model_roots)
        found = holds(place.is_file)
    except ModelError as error:
        raise CalibrationError(error.message, code=error.code, param=_TEXT_PARAM) from error
    if not found:
        raise CalibrationError(
            f"there is no calibration file {text.path!r}", code="text_not_found", param=_TEXT_PARAM
        )
    return place


def local_config(
    spec: JobSpec,
    settings: Settings,
    bit_widths: BitWidthMap | None = None,
    parameters: Path | None = None,
) -> QuantizationConfig:
    """The library's configuration of a job, with the calibration file below a root.

    bit_widths: what `given_map` found; parameters: what `fetch_parameters` fetched.
    """
    text = spec.calibration.text
    file = calibration_file(text, settings) if isinstance(text, FileText) else None
    return spec.config(text=file, bit_widths=bit_widths, parameters=parameters)


def planning_config(spec: JobSpec, bit_widths: BitWidthMap | None) -> QuantizationConfig:
    """What a job is planned and checked by before anything is fetched.

    bit_widths: what `given_map` found. Learned parameters of a job have its id for a folder.
    """
    given = spec.refinement.resume_parameters
    folder = None
    if isinstance(given, JobParameters):
        folder = Path(given.job_id)
    elif isinstance(given, UploadParameters):
        folder = Path(given.upload_id)
    return spec.config(bit_widths=bit_widths, parameters=folder)


def given_map(
    spec: JobSpec,
    store: JobStore,
    catalog: Catalog,
    artifacts: ArtifactStore,
    *,
    tenant: str | None = None,
) -> BitWidthMap | None:
    """The map that the specification holds or refers to; None where it gives none.

    tenant: whose jobs and maps it may refer to. Raises `InputError` (code `map_not_found`).
    """
    given = spec.allocation.map
    if given is None:
        return None
    if isinstance(given, InlineMap):
        return given.map
    if isinstance(given, UploadedMap):
        record = catalog.map(given.map_id, tenant=tenant)
        if record is None:
            raise _no_map(f"no bit-width map {given.map_id!r} was uploaded", "map_id")
        return record.parsed()
    artifact = store.artifact(given.job_id, MAP_NAME, tenant=tenant)
    if artifact is None:
        raise _no_map(f"there is no succeeded job {given.job_id!r} with a bit-width map", "job_id")
    return published_map(given.job_id, artifacts.read(artifact), store, artifacts)


def published_map(
    job_id: str, data: bytes, store: JobStore, artifacts: ArtifactStore
) -> BitWidthMap:
    """The map of a job, whose file holds `data`, with what it was made for where that is known."""
    beside = store.artifact(job_id, MADE_FOR_NAME)
    made_for = None if beside is None else MadeFor.parse(artifacts.read(beside))
    return BitWidthMap.model_validate_json(data).of(made_for)


def check_parameters(
    spec: JobSpec,
    config: QuantizationConfig,
    settings: Settings,
    store: JobStore,
    artifacts: ArtifactStore,
    *,
    tenant: str | None = None,
) -> None:
    """Refuse learned parameters that are not there, or that were learned with other settings.

    config: of `planning_config`; tenant: whose jobs may be referred to. Raises `InputError` (codes
    `parameters_not_found`, `path_not_allowed`, `unfit_parameters`).
    """
    given = spec.refinement.resume_parameters
    if given is None:
        return
    if isinstance(given, JobParameters):
        record = store.artifact(given.job_id, RECORD_NAME, tenant=tenant)
        if record is None:
            raise _no_parameters(_WITHOUT.format(given.job_id), "job_id")
        data = artifacts.read(record)
    else:
        data = (_parameter_folder(given, settings) / RECORD_NAME).read_bytes()
    learned_for = LearnedFor.parse(data)
    known = {"model": learned_for.model, "calibration": learned_for.calibration}
    learned_for.check(LearnedFor.of_job(config, **known))


def fetch_parameters(
    spec: JobSpec, target: Path, settings: Settings, store: JobStore, artifacts: ArtifactStore
) -> Path | None:
    """The local folder of the learned parameters that the specification refers to, if any.

    target: the folder to make for those of a job. Raises `InputError` as `check_parameters` does.
    """
    given = spec.refinement.resume_parameters
    if given is None:
        return None
    if isinstance(given, UploadParameters):
        fetch_upload(settings, artifacts, given.upload_id)
    if not isinstance(given, JobParameters):
        return _parameter_folder(given, settings)
    for path, artifact in _parameter_files(given, store).items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        artifacts.fetch(artifact, target / path)
    return target


def fetch_files(
    job_id: str,
    target: Path,
    store: JobStore,
    artifacts: ArtifactStore,
    waiting: Callable[[Callable[[], None]], None],
) -> None:
    """Put all files of a finished job into the new folder `target`.

    waiting: calls what fetches a file, which may be large. Raises `InputError` (code
    `no_such_output`) where the job or its files are gone.
    """
    files = store.artifacts(job_id)
    if not files:
        raise InputError(
            f"there is no job {job_id!r} with files: it was deleted, or its files were discarded",
            code="no_such_output",
            param="job_id",
        )
    for artifact in files:
        place = target / artifact.path
        place.parent.mkdir(parents=True, exist_ok=True)
        waiting(partial(artifacts.fetch, artifact, place))


def _parameter_files(given: JobParameters, store: JobStore) -> dict[str, Artifact]:
    files = {file.path: file for file in store.artifacts(given.job_id)}
    if RECORD_NAME not in files:
        raise _no_parameters(_WITHOUT.format(given.job_id), "job_id")
    return files


def _parameter_folder(given: PathParameters | UploadParameters, settings: Settings) -> Path:
    if isinstance(given, UploadParameters):
        folder = settings.uploads_folder.resolve() / given.upload_id
        if not (folder / RECORD_NAME).is_file():
            what = f"there are no learned parameters in the upload {given.upload_id!r}"
            raise _no_parameters(what, "upload_id")
        return folder
    try:
        place, _ = resolve_path(given.path, settings.model_roots)
        found = holds((place / RECORD_NAME).is_file)
    except ModelError as error:
        raise InputError(error.message, code=error.code, param=f"{PARAM}.path") from error
    if not found:
        raise _no_parameters(f"there are no learned parameters in {given.path!r}", "path")
    return place


def _no_parameters(problem: str, member: str) -> InputError:
    return InputError(problem, code="parameters_not_found", param=f"{PARAM}.{member}")


def _no_map(problem: str, member: str) -> InputError:
    return InputError(problem, code="map_not_found", param=f"allocation.map.{member}")
