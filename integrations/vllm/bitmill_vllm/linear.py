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
from bitmill.inference.engine_layers import linear_loaded, linear_shares, register_shares
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
        make_known(layer, self.parts[0].name)
        layer.bitmill_outputs = sum(output_partition_sizes)
        shares, layer.bitmill_gathers = linear_shares(
            self.parts,
            (layer.tp_rank, layer.tp_size),
            (input_size_per_partition, input_size),
            output_partition_sizes,
            output_size,
            getattr(layer, "num_kv_head_replicas", 1),
        )
        register_shares(layer, shares, self.config.orders)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        linear_loaded(layer, self.config.orders)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if layer.bitmill_gathers:
            x = tensor_model_parallel_all_gather(x).index_select(-1, layer.bitmill_columns)
        return multiply(layer, x, bias)
