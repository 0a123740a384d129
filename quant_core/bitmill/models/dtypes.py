"""The precision that a model is run in."""

from __future__ import annotations

import torch

from bitmill.plan.model_plan import Plan


def compute_dtype(device: torch.device, plan: Plan) -> torch.dtype:
    """float32 on a CPU and for float32 sources; else the half precision the source is stored in."""
    stored = {linear.dtype for linear in plan.linears}
    if device.type == "cpu" or not stored <= {"BF16", "F16"}:
        return torch.float32
    return torch.bfloat16 if "BF16" in stored else torch.float16
