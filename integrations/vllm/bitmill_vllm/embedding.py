"""What vLLM's embeddings and heads call: look rows up, and give logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from bitmill.formats.packed.config import PackedLinear, require_affine
from bitmill.formats.packed.share import Share
from bitmill.inference.engine_layers import embedding_loaded, register_shares
from bitmill_vllm.operators import look_up, make_known, multiply

if TYPE_CHECKING:
    from bitmill_vllm.config import BitmillConfig


class BitmillEmbeddingMethod(QuantizeMethodBase):
    """A packed embedding or head; without a linear of its own, a head tied to an embedding."""

    def __init__(self, config: BitmillConfig, linear: PackedLinear | None) -> None:
        self.config, self.linear = config, linear
        if linear is not None:
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
        if self.linear is None:
            return
        make_known(layer, self.linear.name)
        held = layer.shard_indices
        rows = (held.org_vocab_start_index, held.org_vocab_end_index)
        layer.bitmill_outputs = rows[1] - rows[0]
        share = Share(self.linear, layer.org_vocab_size, input_size, [rows])
        register_shares(layer, [share], self.config.orders)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        layer.bitmill_tied = (embed_tokens,)  # in a tuple: not a submodule
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if self.linear is not None:
            embedding_loaded(layer, self.config.orders)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        return look_up(layer, input_)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits, padded to the number of rows that vLLM believes the head to have."""
        owner = layer.bitmill_tied[0] if self.linear is None else layer
        y = multiply(owner, x, None)
        y = nn.functional.pad(y, (0, layer.num_embeddings_per_partition - y.shape[-1]))
        return y if bias is None else y + bias
