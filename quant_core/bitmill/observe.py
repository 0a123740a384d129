"""What a linear reads and writes while its block runs, for whole sets of linears at once.

A block is run only as far as the last linear asked about: the inputs of q, k and v cost one norm,
not a block. Inputs come as x [T, K], outputs as y [T, N], T = tokens of the batch in order (for a
routed expert: the tokens sent to it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitmill.blocks import StreamedModel


class Seen(NamedTuple):
    """One call of a linear: its input x [T, K] and output y [T, N]."""

    x: Tensor
    y: Tensor


class _Enough(Exception):
    """Every linear asked about has been called."""


@torch.no_grad()
def observe(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    modules: Mapping[str, nn.Module],
    hidden: Tensor,
) -> dict[str, Seen]:
    """Runs block `index` on hidden [B, T, D] and returns what each named linear saw.

    A linear that was not called (an expert without tokens) is absent.
    """
    seen: dict[str, Seen] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = Seen(_rows(args[0]), _rows(output))
            if len(seen) == len(modules):
                raise _Enough

        return hook

    handles = [m.register_forward_hook(hook_of(name)) for name, m in modules.items()]
    try:
        model.run_block(index, block, hidden)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def advance(
    model: StreamedModel, index: int, block: nn.Module, hidden: Tensor, *, batch: int
) -> Tensor:
    """The block's outputs [S, T, D] for its inputs [S, T, D], on their device, in their dtype."""
    result = torch.empty_like(hidden)
    for start in range(0, hidden.shape[0], batch):
        part = slice(start, start + batch)
        result[part] = model.run_block(index, block, hidden[part]).to(hidden.device, hidden.dtype)
    return result


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])
