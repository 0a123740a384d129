"""The precision that a model is run in, and its names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from bitmill.errors import InputError
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import Plan


def compute_dtype(device: torch.device, plan: Plan) -> torch.dtype:
    """float32 on a CPU and for float32 sources; else the half precision the source is stored in."""
    stored = {linear.dtype for linear in plan.linears}
    if device.type == "cpu" or not stored <= {"BF16", "F16"}:
        return torch.float32
    return torch.bfloat16 if "BF16" in stored else torch.float16


def product_dtype(model: StreamedModel) -> torch.dtype:
    """The dtype of matrix products in learning: bf16 on a GPU for a model in f32, else its own."""
    return torch.bfloat16 if _is_mixed(model) else model.dtype


def mixed_precision(model: StreamedModel) -> AbstractContextManager[object]:
    """Products in `product_dtype` within."""
    if _is_mixed(model):
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return nullcontext()


def _is_mixed(model: StreamedModel) -> bool:
    return model.device.type == "cuda" and model.dtype == torch.float32


def as_dtype(value: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype given as such or by name ("float32", "torch.bfloat16").

    transformers writes a model's dtype into its config by name once the model was saved. Raises
    InputError for any other value.
    """
    found = getattr(torch, str(value).removeprefix("torch."), None)
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise InputError(
        f"dtype {value!r} is no floating-point dtype of torch: give for example 'float32', "
        "'bfloat16' or 'float16'",
        param="dtype",
    )
