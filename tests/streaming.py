"""Tiny models run block by block, and token windows for them."""

from __future__ import annotations

from pathlib import Path

import torch

from bitmill.config.quantization import parse_config
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan

SPEC = parse_config({"budget": {"code_bits": 3}})


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    """The model of a folder on the CPU, all linears of its blocks planned."""
    return StreamedModel(folder, make_plan(folder, SPEC), device=torch.device("cpu"), dtype=dtype)


def token_windows(S: int, seed: int = 0, T: int = 48) -> torch.Tensor:
    """Token ids int64 [S, T] of the tiny models' vocabulary."""
    return torch.randint(2, 258, (S, T), generator=torch.Generator().manual_seed(seed))
