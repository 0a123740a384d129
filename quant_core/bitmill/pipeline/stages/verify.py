"""Stage `verify`: what was packed, read back in a fresh process and held against what was computed.

Raises `VerificationError`; a check that came to no judgement, because its process died, raises what
`run_child` raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from bitmill.config.quantization import Budget
from bitmill.io.atomic import read_json, write_bytes, write_json
from bitmill.pipeline.stage import Run, Stage
from bitmill.pipeline.stages.pack import HASHES_NAME, PACKED_NAME
from bitmill.pipeline.stages.refine import Refined
from bitmill.pipeline.verify import verify_folder
from bitmill.pipeline.workspace import Made
from bitmill.plan.model_plan import PLAN_NAME, Plan
from bitmill.refinement.model import RefinedModel
from bitmill.runtime.child import run_child
from bitmill.transforms.column_order import FoldedOrders

ORDER_NAME = "order.json"
REPORT_NAME = "verify.json"


@dataclass(frozen=True)
class Inputs:
    """packed: the folder of stage `pack`, as it was made this very time."""

    packed: Made
    plan: Plan
    refined: Refined
    budget: Budget


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Writes the order of the fresh process, and waits for it."""
    write_bytes(folder / PLAN_NAME, inputs.plan.model_dump_json().encode())
    order = {
        "folder": str(inputs.packed.folder / PACKED_NAME),
        "plan": str(folder / PLAN_NAME),
        "tensor_hashes": str(inputs.packed.folder / HASHES_NAME),
        "code_hashes": inputs.refined.open(inputs.plan).code_hashes(),
        "refined": str(inputs.refined.folder),
        "budget": inputs.budget.model_dump(mode="json"),
        "report": str(folder / REPORT_NAME),
        "threads": torch.get_num_threads(),
    }
    write_json(folder / ORDER_NAME, order)
    run_child(
        "the process that checks the packed folder",
        ["-m", "bitmill", "verify", str(folder / ORDER_NAME)],
    )


STAGE = Stage("verify", work)


def verify_order(order: dict[str, Any]) -> None:
    """What the fresh process does; `order` is the JSON that the stage wrote."""
    torch.set_num_threads(order["threads"])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    planned = Plan.model_validate_json(Path(order["plan"]).read_bytes())
    report = verify_folder(
        Path(order["folder"]),
        order["code_hashes"],
        Budget.model_validate(order["budget"]),
        planned,
        tensor_hashes=read_json(Path(order["tensor_hashes"])),
        solved=FoldedOrders(RefinedModel(Path(order["refined"]), planned), planned).solved,
    )
    write_json(Path(order["report"]), report.model_dump(mode="json"))
