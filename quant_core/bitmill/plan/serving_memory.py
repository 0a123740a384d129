"""Memory that a model takes beside its weights where it is run, from its plan alone. Torch-free.

    cache      keys and values of every token of `batch` sequences of `context` tokens; a block
               with a sliding window holds that window alone
    workspace  the widest linear in 16 bits (a prompt's products may unpack it), inputs and outputs
               of a block's linears for 2,048 tokens of a prompt, two copies of the logits of
               the last tokens in float32

What a runtime takes for itself (a CUDA context, its own reserves) is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from bitmill.config.quantization import Budget
from bitmill.errors import SpecError
from bitmill.plan.block_memory import activation_bytes, widest_linear
from bitmill.plan.model_plan import Plan

PROMPT_TOKENS = 2048
CACHE_BYTES: Mapping[str, int] = {"fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4}


def cache_bytes(plan: Plan, context: int, batch: int, cache_dtype: str) -> int:
    """Bytes of the keys and values of `batch` sequences of `context` tokens.

    Raises `SpecError` for a plan from before cached values were counted.
    """
    if not plan.cache:
        raise SpecError(
            "this plan does not say what the model caches: plan the model again for a memory "
            "budget, or give budget.size",
            param="budget.memory",
        )
    tokens = sum(layer.values * min(context, layer.window or context) for layer in plan.cache)
    return tokens * batch * CACHE_BYTES[cache_dtype]


def workspace_bytes(plan: Plan, context: int, batch: int) -> int:
    """Bytes of one step's temporaries."""
    tokens = min(PROMPT_TOKENS, context * batch)
    return (
        2 * widest_linear(plan)
        + activation_bytes(plan, 0, tokens, 2)
        + 2 * 4 * batch * plan.vocab_size
    )


def beside_weights(plan: Plan, budget: Budget) -> int:
    """What of a memory budget the weights cannot have, in bytes; 0 for other budgets."""
    if budget.memory is None or budget.context is None:
        return 0
    cache = cache_bytes(plan, budget.context, budget.batch, budget.cache_dtype)
    return cache + workspace_bytes(plan, budget.context, budget.batch)
