"""A tiny model with rounded starts for its blocks: what the tests of learning share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor

from bitmill.config.quantization import parse_config
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.plan.model_plan import make_plan
from bitmill.quant.grid import ClipSettings
from bitmill.quant.tensors import QuantizedWeight
from bitmill.refinement.omniquant.block import BlockData
from solving import quantize_rtn
from tiny import tiny_llama

SPEC = parse_config({"budget": {"code_bits": 3}})


@dataclass(frozen=True)
class Tiny:
    """A streamed two-block Llama, calibration tokens [12, 24] and held-out tokens [4, 24]."""

    model: StreamedModel
    tokens: Tensor
    held_out: Tensor


@cache
def tiny() -> Tiny:
    """Built once per process."""
    folder = Path(mkdtemp())
    tiny_llama(folder, hidden_size=160, intermediate_size=256)
    model = StreamedModel(
        folder, make_plan(folder, SPEC), device=torch.device("cpu"), dtype=torch.float32
    )
    tokens = torch.randint(0, 256, (16, 24), generator=torch.Generator().manual_seed(3))
    return Tiny(model, tokens[:12], tokens[12:])


def starts(
    index: int, widths: tuple[int, ...] = (2, 3), *, order: bool = False, clip: bool = True
) -> dict[str, QuantizedWeight]:
    """Rounded weights of a block: groups take `widths` in turn.

    order: the columns are reversed; clip: grids are searched, else they span the whole range.
    """
    model = tiny().model
    grids = None if clip else ClipSettings.min_max()
    result = {}
    for name, module in model.linears(model.load_block(index), index).items():
        W = weight_of(module)
        groups = -(-W.shape[1] // 128)
        chosen = tuple(widths[g % len(widths)] for g in range(groups))
        columns = torch.arange(W.shape[1]).flip(0) if order else None
        result[name] = quantize_rtn(W, chosen, order=columns, clip=grids)[0]
    return result


@torch.no_grad()
def block_data(index: int = 0) -> BlockData:
    """Float inputs and targets of a block."""
    model = tiny().model

    def run(tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.embed(tokens)
        for earlier in range(index):
            hidden = model.run_block(earlier, model.load_block(earlier), hidden)
        return hidden, model.run_block(index, model.load_block(index), hidden)

    return BlockData(*run(tiny().tokens), *run(tiny().held_out))
