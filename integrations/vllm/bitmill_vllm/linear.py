"""What vLLM's linear layers call: make the parameters, load them, multiply.

With several ranks, a layer whose outputs are split holds rows. One whose inputs are split holds
groups: those of its own columns where these are whole groups and have no order, and needs nothing
else; otherwise the ranks' inputs are gathered and each picks the columns that its groups read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase

from bitmill.formats.packed.config import PackedLinear
from bitmill.formats.packed.share import Share, aligned_groups, even_groups
from bitmill.inference.engine_layers import (
    Product,
    common_order,
    drop_parameters,
    joined_rows,
    output_rows,
    register_shares,
)
from bitmill_vllm.operators import make_known, multiply

if TYPE_CHECKING:
    from bitmill_vllm.config import BitmillConfig


class BitmillLinearMethod(LinearMethodBase):
    """The linears `parts`, side by side, as one layer."""

    def __init__(self, config: BitmillConfig, parts: list[PackedLinear]) -> None:
        self.config, self.parts = config, parts

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rank, ranks = layer.tp_rank, layer.tp_size
        splits_inputs = input_size_per_partition != input_size
        groups, layer.bitmill_gathers = None, False
        if splits_inputs:
            part = self.parts[0]
            own = aligned_groups(rank, ranks, input_size) if part.order is None else None
            groups = own or even_groups(rank, ranks, len(part.widths))
            layer.bitmill_gathers = own is None
        make_known(layer, self.parts[0].name)
        layer.bitmill_outputs = sum(output_partition_sizes)
        cut = sum(output_partition_sizes) != output_size
        copies = getattr(layer, "num_kv_head_replicas", 1)
        rows = output_rows(output_partition_sizes, rank, ranks if cut else 1, copies)
        if len(self.parts) == 1:  # the checkpoint itself may fuse q, k and v
            rows = joined_rows(rows)
        shares = [
            Share(part, self.config.code, N, input_size, ranges, groups)
            for part, (ranges, N) in zip(self.parts, rows, strict=True)
        ]
        register_shares(layer, shares, self.config.orders)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        shares: list[Share] = layer.bitmill_shares
        order = common_order(shares, self.config.orders)
        device = next(layer.parameters()).device
        if layer.bitmill_gathers:
            layer.bitmill_columns = shares[0].reads(order).to(device)
        layer.bitmill = Product([share.weight(order) for share in shares], device)
        drop_parameters(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if layer.bitmill_gathers:
            x = tensor_model_parallel_all_gather(x).index_select(-1, layer.bitmill_columns)
        return multiply(layer, x, bias)
