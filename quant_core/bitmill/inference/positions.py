"""How many tokens a loaded model can run at all."""

from __future__ import annotations

from transformers import PreTrainedModel

from bitmill.errors import InputError
from bitmill.plan.model_plan import POSITION_TABLES


def check_positions(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Raise InputError where `what`, so many tokens, are more than the model has positions for.

    Only a table of learned positions is a limit; rotary ones go on behind what was trained.
    """
    if not any(name.endswith(POSITION_TABLES) for name, _ in model.named_parameters()):
        return
    limit = model.config.max_position_embeddings
    if tokens > limit:
        raise InputError(
            f"{what} is {tokens}; the model has {limit} positions: give fewer tokens",
            code="length_exceeds_model",
        )
