"""`quantize`, `refine` and `sweep`: whole jobs on a local model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitmill.allocation.profiled import Allocated
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Budget, QuantizationConfig, parse_part
from bitmill.config.references import read_map
from bitmill.errors import SpecError
from bitmill.formats.accounting import footprint
from bitmill.io.targets import check_apart, existing
from bitmill.library.progress import Watcher, watching
from bitmill.library.settings import configuration, model_files, names_budget
from bitmill.pipeline.admission import admit
from bitmill.pipeline.job import run_job
from bitmill.pipeline.progress import Progress
from bitmill.pipeline.requests import QuantizeRequest
from bitmill.pipeline.result import Result
from bitmill.pipeline.work_folder import work_folder
from bitmill.plan.model_plan import plan_for_map
from bitmill.runtime.child import run_child

PathLike = str | os.PathLike[str]


def quantize(
    model: PathLike,
    config: QuantizationConfig | None = None,
    *,
    out: PathLike,
    work: PathLike | None = None,
    profiles: PathLike | None = None,
    task_folder: PathLike | None = None,
    device: str = "cpu",
    progress: Watcher | bool | None = None,
    **settings: Any,
) -> Result:
    """Quantize a model into the folder `out`, which appears whole at the end or not at all.

    model: folder of the source model, or a GGUF file. config, settings: what is asked for; keywords
    stand in place of what the configuration says (`bits=3`, `refinement=OmniQuant()`). work: folder
    of finished stages, kept, so that a call which was broken off goes on; without it they are kept
    only where the machine or the program fails, and the error says where.
    profiles: folder of sensitivity profiles to take and to keep. task_folder: task files of one's
    own for `tasks`. device: "cpu", "cuda" or "cuda:N". progress: see `watching`.

    Raises a `BitmillError`: `InputError` for what was asked, `ResourceError` for what the machine
    lacks. Calls of several threads wait for each other.
    """
    folder, gguf = model_files(model)
    asked = configuration(config, settings)
    target = Path(out)
    check_apart({"the source": folder / (gguf or ""), "the output": target})
    with work_folder(target, work) as stages, watching(progress) as watch:
        request = parse_part(
            QuantizeRequest,
            {
                "model": folder,
                "file": gguf,
                "config": asked,
                "out": target,
                "work": stages,
                "profiles": profiles,
                "task_folder": task_folder,
                "device": device,
            },
        )
        if asked.devices > 1:
            return _on_devices(request, watch)
        return run_job(
            asked,
            folder,
            stages,
            target,
            gguf=gguf,
            profile_folder=request.profiles,
            task_folder=request.task_folder,
            device=request.device,
            on_progress=watch,
        )


def refine(
    model: PathLike,
    map: BitWidthMap | Allocated | PathLike,
    config: QuantizationConfig | None = None,
    *,
    out: PathLike,
    **settings: Any,
) -> Result:
    """Quantize a model with a given map: what it does not name stays in the source precision.

    map: a map, what `allocate` found, or a file (JSON, a packed folder, SliM-LLM's .pt). The budget
    is what the map takes, unless one is given. Else as `quantize`.
    """
    folder, gguf = model_files(model)
    given = map.map if isinstance(map, Allocated) else map
    widths = given if isinstance(given, BitWidthMap) else read_map(Path(given))
    theirs = {name: value for name, value in settings.items() if name not in _OPTIONS}
    base = configuration(config or QuantizationConfig(budget=Budget(bits=16)), theirs)
    allocation, planned = plan_for_map(folder, widths, base, gguf=gguf)
    asked = {"budget": Budget(size=footprint(planned, widths).size), "allocation": allocation}
    if names_budget(settings):
        del asked["budget"]
    return quantize(model, config, out=out, **(asked | settings))


def sweep(
    model: PathLike,
    budgets: Sequence[Budget | float],
    config: QuantizationConfig | None = None,
    *,
    out: PathLike,
    work: PathLike | None = None,
    profiles: PathLike | None = None,
    **settings: Any,
) -> list[Result]:
    """Quantize a model to several budgets; the profile is measured once.

    budgets: numbers are `bits`. out: holds a folder for each budget, such as "bits-2.5"; `work`
    likewise. Else as `quantize`. All budgets are checked before the first is begun.
    """
    folder, gguf = model_files(model)
    asked = [
        one if isinstance(one, Budget) else parse_part(Budget, {"bits": one}) for one in budgets
    ]
    names = [f"{one.kind}-{one.value:.12g}" for one in asked]
    if len(set(names)) < len(names):
        raise SpecError(f"budgets {names} name one twice: give each once", param="budgets")
    theirs = {name: value for name, value in settings.items() if name not in _OPTIONS}
    for budget in asked:
        admit(folder, configuration(config, {**theirs, "budget": budget}), gguf=gguf)
    with _kept_profiles(Path(out), profiles) as store:
        return [
            quantize(
                model,
                config,
                out=Path(out, name),
                work=None if work is None else Path(work, name),
                profiles=store,
                budget=budget,
                **settings,
            )
            for name, budget in zip(names, asked, strict=True)
        ]


_OPTIONS = ("work", "profiles", "task_folder", "device", "progress")
"""Keywords of `quantize` that are no settings."""


@contextmanager
def _kept_profiles(near: Path, profiles: PathLike | None) -> Iterator[Path]:
    """The folder of profiles, or one that is gone behind it."""
    if profiles is not None:
        yield Path(profiles)
        return
    place = existing(near.absolute().parent)
    with tempfile.TemporaryDirectory(prefix=".bitmill-", dir=place) as folder:
        yield Path(folder, "profiles")


def _on_devices(request: QuantizeRequest, watch: Watcher) -> Result:
    """A job of several ranks, which need processes of their own."""
    with tempfile.TemporaryDirectory(prefix="bitmill-") as folder:
        file = Path(folder, "request.json")
        file.write_text(request.model_dump_json())
        run_child(
            "the process that starts the ranks",
            ["-m", "bitmill", "quantize", str(file)],
            lambda message: watch(Progress.model_validate(message["progress"])),
        )
    return Result.read(request.out)
