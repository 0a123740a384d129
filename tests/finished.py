"""Jobs brought to any state through the store itself, with real published files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from bitmill.allocation.profile import SensitivityProfile
from bitmill.allocation.profiled import ProfiledModel
from bitmill.errors import ModelError
from bitmill.io.manifest import write_manifest
from bitmill.plan.model_plan import Plan
from bitmill_service.api.context import Context
from bitmill_workers.job_spec import JobSpec, parse_spec
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import JobRecord
from stores import claim

MAP = {
    "schema_version": 1,
    "group_size": 128,
    "order": "natural",
    "linears": {"model.layers.0.mlp.up_proj": "33", "model.layers.0.mlp.down_proj": "24"},
}
REPORT = {"schema_version": 1, "rows": []}


def spec_json(**changes: Any) -> dict[str, Any]:
    """A legal specification for the model `models/tiny`."""
    return {
        "model": {"source": "path", "path": "models/tiny"},
        "budget": {"code_bits": 3},
        "allocation": {"method": "uniform", "order": "natural"},
    } | changes


@dataclass
class Stack:
    """A serving API: its address and its stores."""

    url: str
    context: Context

    @property
    def leases(self) -> LeaseStore:
        return LeaseStore(self.context.database, lease_s=60)

    def queued(self, **changes: Any) -> JobRecord:
        """A queued job that no request made."""
        spec: JobSpec = parse_spec(spec_json(**changes))
        return self.context.jobs.submit(spec).job

    def sweep(self, **grid: list[Any]) -> str:
        """Submit a sweep over these axes; its id."""
        body = {"job": spec_json(), "grid": grid}
        answer = httpx2.post(f"{self.url}/v1/sweeps", json=body, timeout=60).raise_for_status()
        return str(answer.json()["id"])

    def running(self, **changes: Any) -> JobRecord:
        """A job that a worker has claimed."""
        return claim(self.leases, self.queued(**changes).id)

    def failed(self, **changes: Any) -> JobRecord:
        """A job that failed with the code `invalid_model`."""
        job = self.running(**changes)
        assert self.leases.fail(job.id, job.token, ModelError("it is broken", param="model"))
        return self.context.jobs.get(job.id)

    def succeeded(self, weights: bytes = b"weights" * 1000, **changes: Any) -> JobRecord:
        """A job with a map, a report and a weight file of these bytes."""
        return self.finish(self.running(**changes), weights)

    def packed(self, folder: Path) -> JobRecord:
        """A job that made this packed folder."""
        job = self.running()
        target = self.context.artifacts.attempt_folder(job.id, job.token)
        shutil.copytree(folder, target)
        write_manifest(target)
        return self._publish(job, {})

    def profile(self, plan: Plan, profile: SensitivityProfile) -> str:
        """Put a profile into the service's store; its id."""
        folder = self.context.settings.profiles_folder / profile.key
        if not folder.exists():
            ProfiledModel(profile, plan).save(folder)
        self.context.catalog.add_profile(
            profile.key, model="models/tiny", settings={"seed": 0}, path=profile.key
        )
        return profile.key

    def finish(
        self,
        job: JobRecord,
        weights: bytes = b"weights",
        others: Mapping[str, str] | None = None,
        profile: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> JobRecord:
        """Let a running job succeed; others: text of more files, by name."""
        folder = self.context.artifacts.attempt_folder(job.id, job.token)
        folder.mkdir(parents=True)
        (folder / "bit_width_map.json").write_text(json.dumps(MAP))
        (folder / "quality.json").write_text(json.dumps(REPORT))
        (folder / "model.safetensors").write_bytes(weights)
        for name, text in (others or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        write_manifest(folder)
        return self._publish(job, dict(result or {"code_bits": 3.0}), profile)

    def _publish(
        self, job: JobRecord, told: dict[str, Any], profile: str | None = None
    ) -> JobRecord:
        assert self.leases.finalize(job.id, job.token)
        files = self.context.artifacts.publish(job.id, job.token, lambda done, total: None)
        assert self.leases.finish(job.id, job.token, told, files, profile_id=profile)
        return self.context.jobs.get(job.id)
