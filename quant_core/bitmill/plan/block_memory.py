"""Accelerator memory of one decoder block's turn in the passes over a model, from its plan alone.

The passes choose their batches by these figures, and a job's estimate adds them up, so both speak
of the same memory. Torch-free.
"""

from __future__ import annotations

import math

from bitmill.plan.model_plan import Plan

BATCH_TOKENS = 16384

TRANSFER_BYTES = 512 << 20
"""Page-locked host memory of a process through which hidden states reach an accelerator."""


LOGIT_BYTES = 3 * 4 << 25


WORKING_COPIES = 6


FACTOR_COPIES = 6

TRIAL_COPIES = 4


def block_weights(plan: Plan, block: int) -> int:
    prefix = f"{plan.block_prefix}.{block}."
    kept = sum(math.prod(t.shape) for t in plan.tensors if t.module.startswith(prefix))
    return kept + sum(linear.shape.weights for linear in plan.block_linears(block))


def hessian_bytes(plan: Plan, judged: bool, block: int) -> int:
    """Float32 second moments of a block's widest step, those of held-out windows too where they
    judge, and for the widest input an ordered copy, the factor and two more while it is made."""
    sets = 2 if judged else 1
    steps = [[plan.by_name[names[0]].columns for names in step] for step in plan.input_steps(block)]
    together = max((sum(k * k for k in step) for step in steps), default=0)
    widest = max((k * k for step in steps for k in step), default=0)
    return 4 * (sets * together + 4 * widest)


def activation_bytes(plan: Plan, block: int, tokens: int, element: int) -> int:
    """Inputs and outputs of a block's linears for `tokens` tokens; experts share the tokens."""
    dense = [li for li in plan.block_linears(block) if ".experts." not in li.name]
    routed = [li for li in plan.block_linears(block) if ".experts." in li.name]
    width = sum(li.rows + li.columns for li in dense)
    width += sum(li.rows + li.columns for li in routed[:3]) * min(plan.experts, 8)
    return tokens * element * (width + 4 * plan.hidden_size)


def backward_bytes(plan: Plan, element: int, tokens: int) -> int:
    """Accelerator memory of one block's turn in a gradient pass, beside hidden states.

    Two blocks (one is loaded ahead), second moments with the widest factor and what makes it,
    values and gradients of one batch of tokens, one slice of logits.
    """
    per_block = []
    for i in {0, plan.block_count - 1}:
        squares = [linear.columns**2 for linear in plan.block_linears(i)]
        moments = 4 * (sum(squares) + FACTOR_COPIES * max(squares, default=0))
        activations = 2 * activation_bytes(plan, i, tokens, element)
        per_block.append(2 * element * block_weights(plan, i) + moments + activations)
    return LOGIT_BYTES + max(per_block)


def refining_bytes(
    plan: Plan, element: int, tokens: int, *, judged: bool, folded: bool = False
) -> int:
    """Accelerator memory of one block's turn in refinement without learning, beside hidden states.

    Three blocks (quantized, source, the next), values of one batch of tokens, and what is more of
    two: the widest step's second moments (see `hessian_bytes`) with the widest linear's working
    copies, or, where scales of inputs are `folded` first, what finding them holds.
    """
    return max(
        3 * element * block_weights(plan, i)
        + activation_bytes(plan, i, tokens, element)
        + max(
            hessian_bytes(plan, judged, i) + WORKING_COPIES * 4 * widest_linear(plan),
            scaling_bytes(plan, i) if folded else 0,
        )
        for i in {0, plan.block_count - 1}
    )


def scaling_bytes(plan: Plan, block: int) -> int:
    """What finding scales of inputs holds (`refinement/folding.py`), in float32: second moments of
    all inputs that are no expert's, two more of the widest while it is ordered, and of the linears
    that read one input the weights, ordered ones, and copies of the largest that a trial makes.
    """
    groups = [[plan.by_name[name] for name in names] for names in plan.siblings(block)]
    groups = [group for group in groups if not group[0].routed]
    moments = [group[0].columns ** 2 for group in groups]
    weights = [[linear.shape.weights for linear in group] for group in groups]
    trial = max((2 * sum(group) + TRIAL_COPIES * max(group) for group in weights), default=0)
    return 4 * (sum(moments) + 2 * max(moments, default=0) + trial)


def widest_linear(plan: Plan) -> int:
    return max(linear.shape.weights for linear in plan.matrices)
