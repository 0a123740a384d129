"""Tiny models run block by block, and token windows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


class Watched(StreamedModel):
    """A model on the CPU that keeps what torch was told of its kernels, pass for pass.

    forward, backward: whether they had to be deterministic, in every pass through a block whose
    gradients were taken.
    """

    def __init__(self, folder: Path, **changes: Any) -> None:
        plan = make_plan(folder, SPEC)
        super().__init__(folder, plan, device=torch.device("cpu"), dtype=torch.float32, **changes)
        self.forward: list[bool] = []
        self.backward: list[bool] = []

    def run_block(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """As every model's."""
        asked = torch.are_deterministic_algorithms_enabled()
        output = super().run_block(i, block, hidden)
        if output.requires_grad:
            self.forward.append(asked)
            output.register_hook(self._received)
        return output

    def _received(self, _: Tensor) -> None:
        self.backward.append(torch.are_deterministic_algorithms_enabled())
