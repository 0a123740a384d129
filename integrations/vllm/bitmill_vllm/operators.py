"""Operators that find their layer by name.

A compiled graph holds the arguments of its operators as constants and vLLM keeps it on disk for the
next start, so they must name the layer, not number it. vLLM's attention does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context


def make_known(layer: nn.Module, name: str) -> None:
    """Let the operators find a layer by name. Raises ValueError where it is taken."""
    layer.bitmill_name = name
    known = get_current_vllm_config().compilation_config.static_forward_context
    if name in known:
        raise ValueError(f"two layers are made from {name}")
    known[name] = layer


def multiply(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] of x [..., K] by the layer's product; an operator where a graph is traced."""
    if not torch.compiler.is_compiling():
        return layer.bitmill(x, bias)
    return torch.ops.bitmill_vllm.linear(x, bias, layer.bitmill_name, layer.bitmill_outputs)


def look_up(layer: nn.Module, ids: Tensor) -> Tensor:
    """Rows [..., D] of ids [...] of the layer's embedding."""
    if not torch.compiler.is_compiling():
        return layer.bitmill_rows(ids)
    return torch.ops.bitmill_vllm.rows(
        ids, layer.bitmill_name, layer.embedding_dim, layer.bitmill_dtype
    )


@torch.library.custom_op("bitmill_vllm::linear", mutates_args=())
def _linear(x: Tensor, bias: Tensor | None, name: str, outputs: int) -> Tensor:
    return get_forward_context().no_compile_layers[name].bitmill(x, bias)


@_linear.register_fake
def _(x: Tensor, bias: Tensor | None, name: str, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.custom_op("bitmill_vllm::rows", mutates_args=())
def _rows(ids: Tensor, name: str, columns: int, dtype: torch.dtype) -> Tensor:
    return get_forward_context().no_compile_layers[name].bitmill_rows(ids)


@_rows.register_fake
def _(ids: Tensor, name: str, columns: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, columns), dtype=dtype)
