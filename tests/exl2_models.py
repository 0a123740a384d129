"""Tiny models solved on ExLlamaV2's grid, and a reader written from its layout's description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitmill.quant.rewrites import Rewrites
from bitmill.quant.tensors import QuantizedWeight
from bitmill.runtime.ranks import SINGLE
from bitmill.solvers.exllama.solver import ExLlamaSolver
from bitmill.solvers.solver import Linear
from tiny import save_tiny
from tiny_architectures import tiny_config
from weights import PackedModel, pack_model

SIZES = {"hidden_size": 160, "intermediate_size": 288, "head_dim": 32, "num_key_value_heads": 1}
CYCLE = (3, 5, 2, 8, 4, 6)


def solved(W: Tensor, widths: tuple[int, ...], H: Tensor) -> QuantizedWeight:
    (found,) = ExLlamaSolver().solve([Linear("one", W, widths)], H, SINGLE).weights
    assert isinstance(found, QuantizedWeight)
    return found


def packed_model(
    folder: Path, order: str = "natural", kind: str = "llama", **changes: Any
) -> PackedModel:
    """Every linear solved on the grid."""
    config = tiny_config(kind)
    for name, value in (SIZES | {"num_attention_heads": 5} | changes).items():
        setattr(config, name, value)
    source = save_tiny(folder / "source", config)

    def quantize(W: Tensor, widths: tuple[int, ...], order: Tensor | None) -> QuantizedWeight:
        columns = W if order is None else W[:, order.long()]
        return solved(columns, widths, torch.eye(W.shape[1])).rewritten(Rewrites.of_order(order))

    return pack_model(source, folder / "packed", cycle=CYCLE, order=order, quantize=quantize)


def values(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """[count, C] of streams that run down the columns of i32 [W, C]."""
    streams = [int.from_bytes(c.astype("<u4").tobytes(), "little") for c in words.view("u4").T]
    return np.array([[s >> bits * i & (1 << bits) - 1 for s in streams] for i in range(count)])


def weight_of(stored: dict[str, Tensor], name: str) -> Tensor:
    """f16 [N, K], by the arithmetic of exllamav2's kernel: everything in fp16."""
    words, groups, scale, largest, invperm = (
        stored[f"{name}.q_{key}"] for key in ("weight", "groups", "scale", "scale_max", "invperm")
    )
    K, N = len(invperm), words.shape[1]
    starts = [*groups[1::2].tolist(), len(words)]
    rows = []
    for group, bits in enumerate(groups[0::2].tolist()):
        first, last = starts[group], starts[group + 1]
        codes = values(words[first:last].numpy(), bits, (last - first) * 32 // bits)
        nibbles = [int(w) >> 4 * i & 15 for w in scale[group].numpy().view("u4") for i in range(8)]
        k = torch.tensor(nibbles) + 1
        step = (k * k).half() * (largest[group] / 256)
        rows.append((torch.from_numpy(codes) - (1 << (bits - 1))).half() * step)
    assert (groups[0::2].diff() <= 0).all()
    assert sum(map(len, rows)) == K
    assert rows[0].shape[1] == N
    return torch.cat(rows)[invperm.long()].T
