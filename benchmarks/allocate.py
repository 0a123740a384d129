"""Time of the allocator on the shapes of real models, with random costs.

    python benchmarks/allocate.py

Prints CPU milliseconds of the first budget (profile to map) and of the next ones, per budget kind,
and of a curve of 32 maps, alone and again.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from bitmill.allocation.allocator import Allocator  # noqa: E402
from bitmill.config.quantization import Allocation, Budget  # noqa: E402
from bitmill.formats.accounting import footprint  # noqa: E402
from plans import llama_plan, random_profile  # noqa: E402

MODELS = {
    "SmolLM2-135M": {"blocks": 30, "hidden": 576, "inner": 1536, "kv": 192},
    "Llama-2-7B": {"blocks": 32, "hidden": 4096, "inner": 11008, "kv": 4096},
    "Llama-2-70B": {"blocks": 80, "hidden": 8192, "inner": 28672, "kv": 1024},
}


def main() -> None:
    print(f"{'model':14} {'groups':>7} {'kind':10} {'first ms':>9} {'next ms':>9} {'unspent':>9}")
    for name, shape in MODELS.items():
        plan = llama_plan(**shape)
        profile = random_profile(plan, widths=(2, 3, 4, 5, 6, 8))
        groups = sum(s.groups for s in plan.shapes)
        for kind in ("code_bits", "bits", "size"):
            allocator = Allocator(plan, Allocation(), profile)
            taken = footprint(plan, allocator.knapsack(Budget(code_bits=3.1)))
            amount = getattr(taken, kind)
            times: list[float] = []
            for share in np.linspace(1.0, 1.2, 6):
                asked = int(amount * share) if kind == "size" else amount * share
                budget = Budget.model_validate({kind: asked})
                fresh = allocator if times else Allocator(plan, Allocation(), profile)
                begin = time.process_time()
                found = fresh.knapsack(budget)
                times.append(1000 * (time.process_time() - begin))
                allocator = fresh
            unspent = 1 - getattr(footprint(plan, found), kind) / budget.value
            print(
                f"{name:14} {groups:7} {kind:10} {times[0]:9.1f} {np.median(times[1:]):9.1f} "
                f"{unspent:9.2e}"
            )
        allocator = Allocator(plan, Allocation(), profile)
        times = [timed(allocator), timed(allocator)]
        print(f"{name:14} {groups:7} {'curve':10} {times[0]:9.1f} {times[1]:9.1f}")


def timed(allocator: Allocator) -> float:
    """CPU milliseconds of a curve."""
    begin = time.process_time()
    allocator.curve(32)
    return 1000 * (time.process_time() - begin)


if __name__ == "__main__":
    main()
