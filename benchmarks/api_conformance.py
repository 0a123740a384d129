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

Three services: one that asks for no key, one that does and is given an admin's, and one that is
given a key that may only read. To that one every answer below 400 must be of an operation that
needs no more than that scope. That operations which need a key refuse a call without is a check of
Schemathesis' own. `--only` asks one of the three.

Ends with 1 for fewer requests than `--least` of a service, a server error, an operation
reached without its scope, or an answer whose status, type or content is not declared
(Schemathesis' codes ST1..). What remains are its ST2..: requests that the description cannot tell
from others, such as a budget that a model cannot meet.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2

from bitmill_service.client.client import Client
from bitmill_service.embedded.server import EmbeddedService
from bitmill_service.http.access import needed_scope
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.db import Database
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import upgrade
from faulty_hub import FaultyHub, serving
from tiny import tiny_llama

READING = ("--exclude-method", "DELETE", "--exclude-path-regex", "(cancel|retry|/jobs|maps)$")
READS = "with a key that reads"
SERVICES = {
    "open": ("without a key", None),
    "admin": ("with an admin's key", "admin"),
    "read": (READS, "read"),
}
_ASKED = Counter({("GET", "/metrics", "200"): 1})
"""This script's own look at the counts before the requests, with the admin's key."""
_SLOW = "ST112"
"""An answer that took long, which says more of the machine."""
_COUNT = re.compile(r"^bitmill_http_request_seconds_count\{(.*)\} (\S+)$", re.M)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Answers:
    """What a service was asked: method, route and status of each answer, and what was found."""

    counts: Counter[tuple[str, str, str]]
    failures: Counter[str]
    seconds: float

    @property
    def statuses(self) -> Counter[str]:
        """Answers by status."""
        found: Counter[str] = Counter()
        for (_, _, status), count in self.counts.items():
            found[status] += count
        return found

    @property
    def broken(self) -> int:
        """Server errors."""
        return sum(count for status, count in self.statuses.items() if status >= "500")

    @property
    def undeclared(self) -> bool:
        """Whether an answer was not in the description."""
        return any(text.startswith("ST1") and text[:5] != _SLOW for text in self.failures)

    def beyond(self, scope: str) -> list[str]:
        """Operations that a key with this scope reached though they need another."""
        reached = {(m, route) for (m, route, status) in self.counts if status < "400"}
        return [
            f"{method} {route}"
            for method, route in sorted(reached)
            if needed_scope(method, route) not in (None, scope)
        ]


def finished_job(client: Client, model: Path) -> dict[str, str]:
    """The ids of a job that has succeeded, of its profile, a stored map and a whole upload."""
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
    upload = client.upload(model)
    return {
        "job_id": job.id,
        "profile_id": done.profile_id,
        "map_id": stored.id,
        "upload_id": upload.id,
    }


def with_ids(description: dict[str, Any], ids: dict[str, str], files: list[str]) -> dict[str, Any]:
    """The description, with the ids of what there is for all that a path can name."""
    known = {name: [value] for name, value in ids.items()} | {"path": files}
    changed: dict[str, Any] = json.loads(json.dumps(description))
    for operations in changed["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path" and parameter["name"] in known:
                    parameter["schema"] = {"type": "string", "enum": known[parameter["name"]]}
    return changed


def without_security(description: dict[str, Any]) -> dict[str, Any]:
    """The description, as it is where no key is asked for."""
    changed: dict[str, Any] = json.loads(json.dumps(description))
    for operations in changed["paths"].values():
        for operation in operations.values():
            operation.pop("security", None)
    return changed


def answers(http: httpx2.Client) -> Counter[tuple[str, str, str]]:
    """How many answers of each method, route and status the service has given."""
    found: Counter[tuple[str, str, str]] = Counter()
    for labels, count in _COUNT.findall(http.get("/metrics").text):
        told = dict(_LABEL.findall(labels))
        found[told["method"], told["route"], told["status"]] += int(float(count))
    return found


def run(description: Path, url: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """One pass; Schemathesis' own report."""
    report = description.with_suffix(".report.json")
    command = [options.schemathesis, "run", str(description), "--url", url, "--checks", "all"]
    command += ["--seed", str(options.seed), "--continue-on-failure", *more]
    command += ["--header", "Accept: application/json", "--request-timeout", "60"]
    command += ["--generation-database", "none", "--report", "json"]
    command += ["--report-json-path", str(report), "--no-color", "--warnings", "off"]
    subprocess.run(command, check=False, cwd=description.parent)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def ask(folder: Path, options: argparse.Namespace, scope: str | None) -> Answers:
    """Both passes at a service of its own. scope: of the key that is given; None: none is asked."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llama(folder / "models" / "tiny")
    hub = FaultyHub({})
    settings = ServiceSettings(
        data=folder / "data",
        port=0,
        model_roots={"models": folder / "models"},
        hub_endpoint=hub.url,
        keys="off" if scope is None else "required",
        calls_per_minute=1_000_000,
    )
    database = Database(settings.database)
    upgrade(database)
    keys = KeyStore(database)
    admin, _ = keys.create("admin", scopes=["admin"])
    given = admin if scope == "admin" else keys.create("reader", scopes=["read"])[0]
    database.close()
    shown: tuple[str, ...] = () if scope is None else ("--header", f"Authorization: Bearer {given}")
    shown += ("--max-examples", str(options.examples))
    with (
        serving(hub),
        EmbeddedService(settings) as service,
        Client(service.url, api_key=admin) as client,
        httpx2.Client(
            base_url=service.url, headers={"Authorization": f"Bearer {admin}"}, timeout=60
        ) as http,
    ):
        ids = finished_job(client, folder / "models" / "tiny")
        files = [file.path for file in client.files(ids["job_id"]).files]
        assert service.worker is not None
        service.worker.stop()
        description = http.get("/openapi.json").json()
        if scope is None:
            description = without_security(description)
        before, started = answers(http), time.monotonic()
        failures: Counter[str] = Counter()
        passes: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
            ("all", description, ()),
            ("finished", with_ids(description, ids, files), READING),
        )
        for name, told, more in passes:
            place = folder / f"{name}.json"
            place.write_text(json.dumps(told))
            failures.update(failures_of(run(place, service.url, options, *shown, *more)))
        return Answers(answers(http) - before - _ASKED, failures, time.monotonic() - started)


def main() -> int:
    """Ask all three services and print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", default="schemathesis")
    parser.add_argument("--seed", type=int, default=20261128)
    parser.add_argument("--examples", type=int, default=80, help="requests of an operation at most")
    parser.add_argument("--least", type=int, default=5000)
    parser.add_argument("--only", choices=SERVICES)
    parser.add_argument("--keep", type=Path, help="where data and reports stay")
    options = parser.parse_args()
    good = True
    checked = subprocess.run(
        [options.schemathesis, "--version"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        told = {
            name: ask(folder / place, options, scope)
            for place, (name, scope) in SERVICES.items()
            if options.only in (None, place)
        }
    beyond = told[READS].beyond("read") if READS in told else []
    print(
        f"Schemathesis {checked}, FastAPI {version('fastapi')}, Python "
        f"{platform.python_version()}, seed {options.seed}"
    )
    for name, found in told.items():
        good &= found.broken == 0 and not found.undeclared
        good &= found.counts.total() >= options.least
        print_record(name, found)
    if READS in told:
        print(f"\noperations reached beyond the scope read: {', '.join(beyond) or 'none'}")
    return int(not good or bool(beyond))


def failures_of(report: dict[str, Any]) -> dict[str, int]:
    """How many unique failures there are of each kind, by code, title and operations."""
    return {
        f"{failure['code']} {failure['title']}: {', '.join(sorted(failure['operations']))}": (
            failure["count"]
        )
        for failure in report["failures"]
    }


def print_record(name: str, found: Answers) -> None:
    """The table that `benchmarks/results/api_conformance.md` holds."""
    print(f"\n{name}: {found.counts.total():,} requests in {found.seconds:.0f} s")
    print("\n| status | answers |\n|---|---|")
    for status, count in sorted(found.statuses.items()):
        print(f"| {status} | {count:,} |")
    print(f"\n{found.failures.total()} unique failures")
    for text, count in sorted(found.failures.items()):
        print(f"- {count} x {text}")


if __name__ == "__main__":
    sys.exit(main())
