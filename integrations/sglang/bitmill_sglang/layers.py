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
from bitmill.formats.packed.config import PackedLinear
from bitmill.formats.packed.share import Share, aligned_groups, even_groups
from bitmill.inference.engine_layers import (
    Product,
    Rows,
    common_order,
    drop_parameters,
    joined_rows,
    output_rows,
    register_shares,
)
from bitmill.quant.tensors import PackedTensor

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
        rank, ranks = _place(layer, self.parts[0].name)
        groups, layer.bitmill_gathers = None, False
        if input_size_per_partition != input_size:
            part = self.parts[0]
            own = aligned_groups(rank, ranks, input_size) if part.order is None else None
            groups = own or even_groups(rank, ranks, len(part.widths))
            layer.bitmill_gathers = own is None
        cut = sum(output_partition_sizes) != output_size
        copies = getattr(layer, "num_kv_head_replicas", 1)
        rows = output_rows(output_partition_sizes, rank, ranks if cut else 1, copies)
        if len(self.parts) == 1:
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
            x = _gathered(layer, x).index_select(-1, layer.bitmill_columns)
        return layer.bitmill(x, bias)


class BitmillEmbeddingMethod(QuantizeMethodBase):
    """A packed embedding, a packed head, or both in one: SGLang's tied head is the embedding."""

    def __init__(self, config: BitmillConfig, linear: PackedLinear) -> None:
        self.config, self.linear = config, linear
        if config.code != "affine":
            raise FormatError(
                f"{linear.name}: embeddings and heads are served in affine codes only, not "
                f"{config.code}: keep them when the model is quantized",
                param=linear.name,
            )

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
        share = Share(self.linear, self.config.code, layer.org_vocab_size, input_size, [rows])
        register_shares(layer, [share], self.config.orders)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        device = next(layer.parameters()).device
        share: Share = layer.bitmill_shares[0]
        weight = share.weight(common_order([share], self.config.orders))
        assert isinstance(weight, PackedTensor)
        layer.bitmill_rows = Rows(weight, layer.bitmill_dtype)
        layer.bitmill = Product([weight], device)
        drop_parameters(layer)

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
