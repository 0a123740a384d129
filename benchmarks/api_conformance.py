"""The API against its own description: thousands of generated requests, answers compared with it.

    python -m venv /tmp/schemathesis && /tmp/schemathesis/bin/pip install schemathesis==4.32.5
    export PATH=$PATH:/tmp/schemathesis/bin
    PYTHONPATH=tests python benchmarks/api_conformance.py

Serves the embedded service with a job that a real worker has finished, so that maps, reports,
files, profiles and logs exist. Schemathesis (https://schemathesis.io) makes requests from
`/openapi.json`, legal and illegal ones, with all checks. Twice: every operation with whatever ids
it makes up; then those that leave the job as it is, with the ids of what there is. It always sends
`Accept: application/json`, because an event stream does not end before its job; streams are tested
in `tests/service/test_events.py`. The Hub is one on loopback that knows no repository.

Ends with 1 for fewer requests than `--least`, a server error, or an answer whose status, type or
content is not declared (Schemathesis' codes ST1..). What remains are its ST2..: requests that the
description cannot tell from others, such as a budget that a model cannot meet.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2

from bitmill_service.client.client import Client
from bitmill_service.embedded.server import EmbeddedService
from bitmill_service.settings import ServiceSettings
from faulty_hub import FaultyHub, serving
from tiny import tiny_llama

READING = ("--exclude-method", "DELETE", "--exclude-path-regex", "(cancel|retry|/jobs|maps)$")
_COUNT = re.compile(r'^bitmill_http_request_seconds_count\{.*status="(\d+)"\} (\S+)$', re.M)


def finished_job(client: Client) -> dict[str, str]:
    """The ids of a job that has succeeded, of its profile and of a stored map."""
    job = client.submit(
        {
            "model": {"source": "path", "path": "models/tiny"},
            "budget": {"bits": 4.5},
            "refinement": {"method": "rtn"},
            "calibration": {"sequences": 4, "length": 64, "held_out": 1},
            "evaluation": {"sequences": 1, "length": 64},
        }
    )
    done = client.wait(job.id, timeout=600)
    assert done.profile_id is not None
    stored = client.upload_map(client.bit_width_map(job.id).to_json().encode())
    return {"job_id": job.id, "profile_id": done.profile_id, "map_id": stored.id}


def with_ids(description: dict[str, Any], ids: dict[str, str], files: list[str]) -> dict[str, Any]:
    """The description, with the ids of what there is for all that a path can name."""
    known = {name: [value] for name, value in ids.items()} | {"path": files}
    changed: dict[str, Any] = json.loads(json.dumps(description))
    for operations in changed["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["schema"] = {"type": "string", "enum": known[parameter["name"]]}
    return changed


def answers(url: str) -> Counter[str]:
    """How many answers of each status the service has given."""
    found: Counter[str] = Counter()
    for status, count in _COUNT.findall(httpx2.get(f"{url}/metrics").text):
        found[status] += int(float(count))
    return found


def run(description: Path, url: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """One pass; Schemathesis' own report."""
    report = description.with_suffix(".report.json")
    command = [options.schemathesis, "run", str(description), "--url", url, "--checks", "all"]
    command += ["--seed", str(options.seed), "--max-examples", str(options.examples)]
    command += ["--continue-on-failure", *more]
    command += ["--header", "Accept: application/json", "--request-timeout", "60"]
    command += ["--generation-database", "none", "--report", "json"]
    command += ["--report-json-path", str(report), "--no-color", "--warnings", "off"]
    subprocess.run(command, check=False, cwd=description.parent)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def main() -> int:
    """Run both passes and print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", default="schemathesis")
    parser.add_argument("--seed", type=int, default=20261128)
    parser.add_argument("--examples", type=int, default=60, help="requests of an operation at most")
    parser.add_argument("--least", type=int, default=3000)
    parser.add_argument("--keep", type=Path, help="where the reports stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tiny_llama(Path(scratch) / "models" / "tiny")
        hub = FaultyHub({})
        settings = ServiceSettings(
            data=Path(scratch) / "data",
            port=0,
            model_roots={"models": Path(scratch) / "models"},
            hub_endpoint=hub.url,
        )
        with serving(hub), EmbeddedService(settings) as service, Client(service.url) as client:
            ids = finished_job(client)
            files = [file.path for file in client.files(ids["job_id"]).files]
            assert service.worker is not None
            service.worker.stop()
            description = httpx2.get(f"{service.url}/openapi.json").json()
            before, started = answers(service.url), time.monotonic()
            failures: Counter[str] = Counter()
            passes: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
                ("all", description, ()),
                ("finished", with_ids(description, ids, files), READING),
            )
            for name, given, more in passes:
                place = folder / f"{name}.json"
                place.write_text(json.dumps(given))
                failures.update(failures_of(run(place, service.url, options, *more)))
            seen = answers(service.url) - before
            seconds = time.monotonic() - started
    print_record(seen, failures, seconds, options)
    broken = sum(count for status, count in seen.items() if status >= "500")
    undeclared = any(text.startswith("ST1") for text in failures)
    return int(broken > 0 or undeclared or sum(seen.values()) < options.least)


def failures_of(report: dict[str, Any]) -> dict[str, int]:
    """How many unique failures there are of each kind, by code, title and operations."""
    return {
        f"{failure['code']} {failure['title']}: {', '.join(sorted(failure['operations']))}": (
            failure["count"]
        )
        for failure in report["failures"]
    }


def print_record(
    seen: Counter[str], failures: Counter[str], seconds: float, options: argparse.Namespace
) -> None:
    """The table that `benchmarks/results/api_conformance.md` holds."""
    checked = subprocess.run(
        [options.schemathesis, "--version"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    print(f"{sum(seen.values()):,} requests in {seconds:.0f} s, seed {options.seed}")
    print(
        f"Schemathesis {checked}, FastAPI {version('fastapi')}, Python {platform.python_version()}"
    )
    print("\n| status | answers |\n|---|---|")
    for status, count in sorted(seen.items()):
        print(f"| {status} | {count:,} |")
    print(f"\n{failures.total()} unique failures")
    for text, count in sorted(failures.items()):
        print(f"- {count} x {text}")


if __name__ == "__main__":
    sys.exit(main())
