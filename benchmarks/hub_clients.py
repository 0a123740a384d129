"""Three generations of the Hub's client against the Hub read API, each in its own environment.

    PYTHONPATH=tests python benchmarks/hub_clients.py

Makes a virtual environment for each version (pip needs an index), serves a finished job that asks
for keys, and lets each client download it whole, compare digests, meet a wrong key and a file that
is not there. Prints the table of `results/hub_clients.md`; ends with 1 where anything differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from finished import Stack
from serving import serve

VERSIONS = ("0.36.2", "1.33.0", "2.4.0")
_ASK = """
import hashlib, json, pathlib, sys
import huggingface_hub as hub
url, key, repo, cache = sys.argv[1:]
told = {"version": hub.__version__}
options = {"endpoint": url, "cache_dir": cache}
folder = pathlib.Path(hub.snapshot_download(repo, token=key, **options))
sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
right = [hashlib.sha256((folder / name).read_bytes()).hexdigest() == sums[name] for name in sums]
told["files with right digests"] = f"{sum(right)} of {len(right)}"
api = hub.HfApi(endpoint=url, token=key)
told["model_info"] = len(api.model_info(repo, files_metadata=True).siblings)
told["list_repo_files"] = len(api.list_repo_files(repo))
def refused(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "nothing"
told["wrong key"] = refused(lambda: hub.HfApi(endpoint=url, token=key[:-1]).model_info(repo))
told["token of the Hub"] = refused(
    lambda: hub.HfApi(endpoint=url, token="hf_" + "a" * 34).model_info(repo)
)
told["no such file"] = refused(lambda: hub.hf_hub_download(repo, "none", token=key, **options))
told["no such job"] = refused(lambda: hub.hf_hub_download("jobs/none", "x", token=key, **options))
print(json.dumps(told))
"""


def main() -> int:
    """Ask with every version and print what each was told."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        app = create_app(ServiceSettings(data=Path(scratch, "data")))
        upgrade(app.state.context.database)
        key, _ = app.state.context.keys.store.create("reader", scopes=["read"], tenant="local")
        with serve(app) as url:
            stack = Stack(url, app.state.context)
            others = {"config.json": "{}", "additional_chat_templates/a.jinja": "{{ x }}"}
            job = stack.finish(stack.running(), os.urandom(30_000_000), others)
            for version in VERSIONS:
                place = Path(scratch, version)
                venv.create(place, with_pip=True)
                python = str(place / "bin" / "python")
                wanted = f"huggingface_hub=={version}"
                subprocess.run([python, "-m", "pip", "install", "-q", wanted], check=True)
                home = {"HF_HOME": str(place / "home"), "PYTHONPATH": ""}
                asked = subprocess.run(
                    [python, "-c", _ASK, url, key, f"jobs/{job.id}", str(place / "cache")],
                    env=os.environ | home,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                rows.append(json.loads(asked.stdout))
    names = list(rows[0])
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(str(row[name]) for name in names)} |")
    differ = {tuple(row[name] for name in names[1:4]) for row in rows}
    return 0 if len(differ) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
