"""Windows run through a block in batches, and what its linears read and write meanwhile.

To see linears a block is run only as far as the last one asked about: the inputs of q, k and v cost
one norm, not a block. Inputs come as x [T, K], outputs as y [T, N], T = tokens of the batch in
order (for a routed expert: the tokens sent to it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitmill.models.streamed import StreamedModel


class Seen(NamedTuple):
    """One call of a linear: its input x [T, K] and output y [T, N]."""

    x: Tensor
    y: Tensor


class Ends(NamedTuple):
    """Inputs [T, K] and outputs [T, N] by name, and the whole block's output where asked for."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    block: Tensor | None


class _Enough(Exception):
    """Every linear asked about has been called."""


def batches(windows: int, batch: int) -> Iterator[slice]:
    """All windows in their order, `batch` at a time."""
    for start in range(0, windows, batch):
        yield slice(start, start + batch)


@torch.no_grad()
def embed_windows(
    model: StreamedModel, tokens: Tensor, *, batch: int, out: Tensor | None = None
) -> Tensor:
    """The first block's inputs [S, T, D] of windows i64 [S, T], in `out` or else on the CPU."""
    if out is None:
        out = torch.empty((*tokens.shape, model.plan.hidden_size), dtype=model.dtype)
    for part in batches(len(tokens), batch):
        model.transfers.store(out[part], model.embed(tokens[part]))
    model.transfers.finish()
    return out


@torch.no_grad()
def run_windows(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    hidden: Tensor,
    *,
    batch: int,
    out: Tensor | None = None,
) -> Tensor:
    """The outputs [S, T, D] of block `index` for its inputs [S, T, D].

    out: where they go, `hidden` itself for example; else a tensor of its device and dtype. Copies
    into memory that is page-locked itself are under way when it returns.
    """
    out = torch.empty_like(hidden) if out is None else out
    for part, (x,) in model.transfers.batches([hidden], batches(len(hidden), batch)):
        model.transfers.store(out[part], model.run_block(index, block, x))
    return out


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
    inputs, outputs, _ = observe_ends(model, index, block, modules, modules, hidden)
    return {name: Seen(inputs[name], y) for name, y in outputs.items()}


@torch.no_grad()
def observe_ends(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    read: Mapping[str, nn.Module],
    written: Mapping[str, nn.Module],
    hidden: Tensor,
    *,
    whole: bool = False,
) -> Ends:
    """Inputs of some linears and outputs of others, as `observe` gives both.

    A linear that is only read is not run if the block can stop there. whole: it runs to its end.
    Outputs are copies: a block may add to them in place (falcon adds attention to its MLP's).
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def stop_if_done() -> None:
        if not whole and len(inputs) == len(read) and len(outputs) == len(written):
            raise _Enough

    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = _rows(args[0])
            stop_if_done()

        return hook

    def after(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            outputs[name] = _rows(output).clone()
            stop_if_done()

        return hook

    handles = [m.register_forward_pre_hook(before(name)) for name, m in read.items()]
    handles += [m.register_forward_hook(after(name)) for name, m in written.items()]
    result = None
    try:
        result = model.run_block(index, block, hidden)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return Ends(inputs, outputs, result if whole else None)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])
