"""What SGLang's layers call: make the parameters, load them, multiply, look rows up.

With several ranks, a layer whose outputs are split holds rows. One whose inputs are split holds
groups: those of its own columns where these are whole groups and have no order, and needs nothing
else; otherwise the ranks' inputs are gathered and each picks the columns that its groups read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizeMethodBase
from torch import Tensor, nn

from bitmill.errors import FormatError
from bitmill.formats.packed.config import PackedLinear, require_affine
from bitmill.formats.packed.share import Share
from bitmill.inference.engine_layers import (
    embedding_loaded,
    linear_loaded,
    linear_shares,
    register_shares,
)

if TYPE_CHECKING:
    from bitmill_sglang.config import BitmillConfig


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
        shares, layer.bitmill_gathers = linear_shares(
            self.parts,
            _place(layer, self.parts[0].name),
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
            x = _gathered(layer, x).index_select(-1, layer.bitmill_columns)
        return layer.bitmill(x, bias)


class BitmillEmbeddingMethod(QuantizeMethodBase):
    """A packed embedding, a packed head, or both in one: SGLang's tied head is the embedding."""

    def __init__(self, config: BitmillConfig, linear: PackedLinear) -> None:
        self.config, self.linear = config, linear
        require_affine(linear)

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
        layer.bitmill_dtype = params_dtype
        layer.bitmill_padded = sum(output_partition_sizes)
        held = layer.shard_indices
        rows = (held.org_vocab_start_index, held.org_vocab_end_index)
        share = Share(self.linear, layer.org_vocab_size, input_size, [rows])
        register_shares(layer, [share], self.config.orders)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        embedding_loaded(layer, self.config.orders)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        return layer.bitmill_rows(input_)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits, padded to the number of rows that SGLang believes the head to have."""
        y = layer.bitmill(x, None)
        y = nn.functional.pad(y, (0, layer.bitmill_padded - y.shape[-1]))
        return y if bias is None else y + bias


def _place(layer: nn.Module, name: str) -> tuple[int, int]:
    """Rank and number of ranks of a layer; it has no group where it is whole on every rank."""
    group = getattr(layer, "tp_group", None)
    if getattr(layer, "kv_tp_group", group) is not group:
        raise FormatError(
            f"{name}: SGLang splits keys and values over other ranks than queries: start it "
            "without --enable-dp-attention",
            param=name,
        )
    if group is not None:
        return group.rank_in_group, group.world_size
    return getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)


def _gathered(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs of all ranks side by side, [..., K]."""
    group = getattr(layer, "tp_group", None)
    if group is not None:
        return group.all_gather(x, dim=-1)
    from sglang.srt.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(x)
