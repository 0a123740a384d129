"""What a map leaves of its budget, and why: a warning for whoever expected it to be spent.

`uniform` and `sba` take whole widths, so up to one bit a weight can stay unspent; any method leaves
what lies above the largest legal width.
"""

from __future__ import annotations

from bitmill.allocation.allocator import Allocator
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import QuantizationConfig
from bitmill.formats.accounting import describe, footprint, limit, measure_map
from bitmill.plan.model_plan import Plan
from bitmill.plan.serving_memory import beside_weights

UNSPENT_SHARE = 0.02
"""Share of a budget that may stay unspent without a word."""


def unspent_warning(plan: Plan, config: QuantizationConfig, chosen: BitWidthMap) -> str | None:
    """A sentence with what was asked for, what is taken and the next size, or None."""
    budget = config.budget
    if budget.max_loss_increase is not None:
        return None
    beside = beside_weights(plan, budget)
    most = limit(plan, budget) + beside
    taken = measure_map(plan, chosen, budget.kind) + beside
    if taken >= (1 - UNSPENT_SHARE) * most:
        return None
    unit = " bytes" if budget.in_bytes else ""
    tokens = f" with {budget.batch} x {budget.context} tokens and workspace" if beside else ""
    asked = f"{budget.value:,}" if budget.in_bytes else f"{budget.value}"
    spent, reason = footprint(plan, chosen), _reason(plan, config, most - beside)
    return (
        f"budget {budget.kind} = {asked}{unit}: the map takes "
        f"{describe(plan, budget.kind, taken)}{tokens}, {100 * (most - taken) // most} % stays "
        f"unspent; {reason}. It has {spent.code_bits:.3f} code_bits, which with scales, zero "
        f"points and orders are {spent.bits:.3f} bits"
    )


def _reason(plan: Plan, config: QuantizationConfig, most: int) -> str:
    method, kind = config.allocation.method, config.budget.kind
    if method == "map":
        return "the given map asks for no more"
    groups = Allocator(plan, config.allocation).groups
    sizes = {int(w): groups.measure(groups.uniform(int(w)), kind) for w in groups.widths}
    above = {width: size for width, size in sizes.items() if size > most}
    if not above or method == "knapsack":
        return f"the largest width allowed is {max(sizes)}"
    width, size = min(above.items(), key=lambda item: item[1])
    size += beside_weights(plan, config.budget)
    return (
        f"{method!r} takes whole widths, and {width} needs {kind} = {describe(plan, kind, size)} "
        "('knapsack' spends any budget)"
    )
