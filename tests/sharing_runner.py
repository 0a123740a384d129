"""A runner that makes one stage which travels, in a real workspace, and publishes what it finds.

Its work takes as long as the label says and adds a line to the file `made` beside the data folders.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.io.manifest import write_manifest
from bitmill.pipeline.progress import Progress
from bitmill.pipeline.stage import Run, Stage
from bitmill.pipeline.workspace import Workspace
from bitmill_workers.execution.child import Emit, serve
from bitmill_workers.execution.stage_turns import RunnerTurns


@dataclass(frozen=True)
class Inputs:
    same: int = 1


def act(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    work_dir, output = Path(request["job_dir"]), Path(request["output_dir"])

    def work(inputs: Inputs, run: Run, folder: Path) -> None:
        with (work_dir.parents[3] / "made").open("a") as history:
            history.write(f"{os.getpid()}\n")
        time.sleep(float(request["label"]))
        (folder / "found").write_bytes(os.urandom(8))

    def tell(event: Progress) -> None:
        emit({"type": "progress", **event.model_dump(mode="json", exclude_none=True)})

    space = Workspace(
        work_dir,
        tell,
        lambda: False,
        shared=Path(request["stage_folder"]),
        turns=RunnerTurns(emit, Path(request["turns"])),
    )
    made = space.run(Stage("profile", work, travels=True), Inputs())
    output.mkdir(parents=True)
    (output / "found").write_bytes((made.folder / "found").read_bytes())
    write_manifest(output)
    return {"result": {"found": (output / "found").read_bytes().hex()}, "profile_id": None}


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], act))
