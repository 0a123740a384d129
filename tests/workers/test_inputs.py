"""Maps, calibration files and learned parameters that a specification refers to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.made_for import MADE_FOR_NAME, MadeFor
from bitmill.config.quantization import FileText
from bitmill.errors import CalibrationError, InputError
from bitmill.pipeline.learned_parameters import RECORD_NAME
from bitmill_workers.execution.inputs import (
    fetch_parameters,
    given_map,
    local_config,
    planning_config,
)
from bitmill_workers.job_spec import JobSpec, parse_spec
from bitmill_workers.settings import Settings
from bitmill_workers.storage.local import LocalArtifacts
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import Artifact
from stores import QUEUES, spec

MAP = BitWidthMap(order="natural", linears={"model.layers.0.mlp.up_proj": (3, 3)})


def spec_with(**allocation: Any) -> JobSpec:
    model = {"source": "path", "path": "models/tiny"}
    return parse_spec({"model": model, "budget": {"bits": 3}, "allocation": allocation})


def with_map(**reference: Any) -> JobSpec:
    return spec_with(method="map", order="natural", map=reference)


@pytest.fixture
def artifacts(settings: Settings) -> LocalArtifacts:
    return LocalArtifacts(settings.artifacts_folder)


def test_map_is_found_wherever_it_is(
    store: JobStore,
    leases: LeaseStore,
    catalog: Catalog,
    artifacts: LocalArtifacts,
    settings: Settings,
) -> None:
    uploaded = catalog.add_map(MAP.model_dump(mode="json"))
    store.submit(spec())
    job = leases.claim_next("w", QUEUES)
    assert job is not None
    file = Artifact(MAP_NAME, 1, "0" * 64, f"{job.id}/1/{MAP_NAME}")
    (artifacts.root / job.id / "1").mkdir(parents=True)
    (artifacts.root / file.storage_key).write_text(MAP.to_json())
    assert leases.finalize(job.id, job.token)
    assert leases.finish(job.id, job.token, {}, [file])
    inline = with_map(source="inline", map=MAP.model_dump(mode="json"))
    parts = (store, catalog, artifacts)
    assert given_map(spec_with(), *parts) is None
    assert given_map(inline, *parts) == MAP
    for reference in (
        with_map(source="upload", map_id=uploaded.id),
        with_map(source="job", job_id=job.id),
    ):
        assert given_map(reference, *parts) == MAP
        for made in (local_config(reference, settings, MAP), planning_config(reference, MAP)):
            assert made.allocation.map == MAP


def test_a_map_says_what_it_was_made_for_wherever_it_is(
    store: JobStore, leases: LeaseStore, catalog: Catalog, artifacts: LocalArtifacts
) -> None:
    known = MadeFor(shape="a" * 64, weights="b" * 64, model="org/base")
    uploaded = catalog.add_map(MAP.model_dump(mode="json"), name="org/base", model=known)
    store.submit(spec())
    job = leases.claim_next("w", QUEUES)
    assert job is not None
    texts = {MAP_NAME: MAP.to_json(), MADE_FOR_NAME: known.to_json()}
    files = [Artifact(name, 1, "0" * 64, f"{job.id}/1/{name}") for name in texts]
    (artifacts.root / job.id / "1").mkdir(parents=True)
    for file in files:
        (artifacts.root / file.storage_key).write_text(texts[file.path])
    assert leases.finalize(job.id, job.token)
    assert leases.finish(job.id, job.token, {}, files)
    for reference in (
        with_map(source="inline", map=MAP.of(known).model_dump(mode="json")),
        with_map(source="upload", map_id=uploaded.id),
        with_map(source="job", job_id=job.id),
    ):
        found = given_map(reference, store, catalog, artifacts)
        assert found is not None
        assert found.made_for == known
        given = planning_config(reference, found).allocation.map
        assert given is not None
        assert given.made_for == known


@pytest.mark.parametrize("reference", [("upload", "map_id"), ("job", "job_id")])
def test_missing_map_is_named(
    store: JobStore, catalog: Catalog, artifacts: LocalArtifacts, reference: tuple[str, str]
) -> None:
    source, member = reference
    with pytest.raises(InputError, match="'nope'") as refused:
        given_map(with_map(source=source, **{member: "nope"}), store, catalog, artifacts)
    assert (refused.value.code, refused.value.param) == (
        "map_not_found",
        f"allocation.map.{member}",
    )


def test_calibration_file_must_lie_below_a_root(settings: Settings, tmp_path: Path) -> None:
    def calibrated(path: str) -> JobSpec:
        text = {"source": "file", "path": path}
        return spec(calibration={"text": text, "sequences": 1, "length": 8, "held_out": 0})

    root = settings.model_roots["models"]
    (root / "text.txt").write_text("words")
    made = local_config(calibrated("models/text.txt"), settings)
    assert made.calibration.text == FileText(path=str(root / "text.txt"))
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    for path, code in (
        ("models/none.txt", "text_not_found"),
        ("models/link.txt", "path_not_allowed"),
        ("models/../secret.txt", "path_not_allowed"),
    ):
        with pytest.raises(CalibrationError) as refused:
            local_config(calibrated(path), settings)
        assert (refused.value.code, refused.value.param) == (code, "calibration.text.path")


def with_parameters(**reference: str) -> JobSpec:
    omniquant = {"resume_parameters": reference}
    return spec(refinement={"method": "omniquant", "omniquant": omniquant})


def test_learned_parameters_of_a_job_become_a_local_folder(
    settings: Settings,
    store: JobStore,
    leases: LeaseStore,
    artifacts: LocalArtifacts,
    tmp_path: Path,
) -> None:
    store.submit(spec())
    job = leases.claim_next("w", QUEUES)
    assert job is not None
    names = (RECORD_NAME, "model.safetensors", "deep/file")
    files = [Artifact(name, 1, "0" * 64, f"{job.id}/1/{name}") for name in names]
    for file in files:
        (artifacts.root / file.storage_key).parent.mkdir(parents=True, exist_ok=True)
        (artifacts.root / file.storage_key).write_text(file.path)
    asked, target = with_parameters(source="job", job_id=job.id), tmp_path / "parameters"
    parts = (target, settings, store, artifacts)
    with pytest.raises(InputError, match="no succeeded job"):
        fetch_parameters(asked, *parts)
    assert not target.exists()
    assert leases.finalize(job.id, job.token)
    assert leases.finish(job.id, job.token, {}, files)
    assert fetch_parameters(spec(), *parts) is None
    assert fetch_parameters(asked, *parts) == target
    assert {name: (target / name).read_text() for name in names} == {n: n for n in names}
    (artifacts.root / files[1].storage_key).unlink()
    assert (target / "model.safetensors").read_text() == "model.safetensors"
    fetched = local_config(asked, settings, None, target)
    assert fetched.refinement.omniquant.resume_parameters == target
    planned = planning_config(asked, None)
    assert planned.refinement.omniquant.resume_parameters is not None


def test_learned_parameters_below_a_root_are_used_where_they_are(
    settings: Settings, store: JobStore, artifacts: LocalArtifacts, tmp_path: Path
) -> None:
    parts = (tmp_path / "unused", settings, store, artifacts)
    folder = settings.model_roots["models"] / "tiny"
    asked = with_parameters(source="path", path="models/tiny")
    with pytest.raises(InputError, match="no learned parameters in 'models/tiny'"):
        fetch_parameters(asked, *parts)
    (folder / RECORD_NAME).write_text("{}")
    assert fetch_parameters(asked, *parts) == folder
    with pytest.raises(InputError, match="not below an allowed root"):
        fetch_parameters(with_parameters(source="path", path="elsewhere/tiny"), *parts)
