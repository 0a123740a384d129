"""`profile` and `allocate`: what every width costs every group, and maps for any budget."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bitmill.allocation.profiled import Allocated, ProfiledModel
from bitmill.config.quantization import Budget, QuantizationConfig, parse_part
from bitmill.library.progress import Watcher, watching
from bitmill.library.settings import configuration, gathered, model_files

PathLike = str | os.PathLike[str]


def profile(
    model: PathLike,
    config: QuantizationConfig | None = None,
    *,
    work: PathLike | None = None,
    profiles: PathLike | None = None,
    device: str = "cpu",
    progress: Watcher | bool | None = None,
    **settings: Any,
) -> ProfiledModel:
    """Measure what widths cost, once for any number of budgets.

    A budget is needed for allocation "sba" alone, whose profile is of one base width. profiles: a
    folder that keeps profiles by id for `quantize`, `sweep` and later calls; `ProfiledModel.save`
    writes one. Else as `quantize`.
    """
    from bitmill.pipeline.job import run_profile

    folder, gguf = model_files(model)
    asked = configuration(config or QuantizationConfig(budget=Budget(bits=16)), settings)
    with ExitStack() as within:
        watch = within.enter_context(watching(progress))
        if work is None:
            work = Path(within.enter_context(tempfile.TemporaryDirectory()), "work")
        return run_profile(
            asked,
            folder,
            Path(work),
            gguf=gguf,
            profile_folder=None if profiles is None else Path(profiles),
            device=device,
            on_progress=watch,
        )


def allocate(profiled: ProfiledModel | PathLike, **settings: Any) -> Allocated:
    """The map for a budget on a profile: pure numbers, no model and no torch.

    profiled: what `profile` made, or its folder. settings: a budget (`bits=3`) and fields of
    `Allocation`; what is left open is as the profile was made.

    Raises `BudgetError` naming the smallest budget that would fit, and `SpecError` where other
    groups are asked for than the profile has.
    """
    model = profiled
    if not isinstance(model, ProfiledModel):
        model = ProfiledModel.load(Path(model))
    asked = gathered(settings, ("budget", "allocation"))
    budget = parse_part(QuantizationConfig, {"budget": asked.get("budget", {})}).budget
    return model.allocate(budget, model.allocator(asked.get("allocation", {})))
