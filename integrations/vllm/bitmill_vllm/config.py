"""`quantization_config` as vLLM asks for it: which method computes which layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from bitmill.errors import FormatError
from bitmill.formats.packed.complete import check_complete
from bitmill.formats.packed.config import QUANT_METHOD, PackedConfig, PackedLinear
from bitmill.inference.engine_layers import joined_parts

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


@register_quantization_config(QUANT_METHOD)
class BitmillConfig(QuantizationConfig):
    """The quantized linears of a checkpoint under the names that the vLLM model gives them.

    orders: column orders i32 [K] by name, put here by the layers that own them
    """

    def __init__(self, packed: PackedConfig) -> None:
        super().__init__()
        self.linears: dict[str, PackedLinear] = dict(packed.linears)
        self.orders: dict[str, Tensor] = {}
        self.tied = False

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitmillConfig:
        return cls(PackedConfig.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """The only call that shows the model: learn whether head and embedding are one, and refuse
        a folder with a tensor too few or too many. vLLM counts neither."""
        self.tied = bool(getattr(hf_config.get_text_config(), "tie_word_embeddings", False))
        if Path(model_name).is_dir():
            check_complete(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename linears, and the orders that they name, as the model renames its modules."""
        renamed = {}
        for name, linear in self.linears.items():
            new = hf_to_vllm_mapper.map_name(name)
            order = linear.order and hf_to_vllm_mapper.map_name(linear.order)
            if new is not None:
                renamed[new] = replace(linear, name=new, order=order)
        self.linears = renamed

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from bitmill_vllm.embedding import BitmillEmbeddingMethod
        from bitmill_vllm.linear import BitmillLinearMethod

        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            return BitmillLinearMethod(self, parts) if parts else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            if prefix in self.linears:
                return BitmillEmbeddingMethod(self, self.linears[prefix])
            tied = self.tied and self._embedding("") is not None
            return BitmillEmbeddingMethod(self, None) if tied else None
        if isinstance(layer, VocabParallelEmbedding):
            linear = self._embedding(prefix)
            return None if linear is None else BitmillEmbeddingMethod(self, linear)
        if "expert" in prefix and any(name.startswith(f"{prefix}.") for name in self.linears):
            raise FormatError(f"{prefix}: vLLM cannot serve packed experts yet", param=prefix)
        return None

    def _parts(self, prefix: str) -> list[PackedLinear]:
        """The linears that a layer is made of, in the order of its outputs."""
        return joined_parts(self.linears, prefix, self.packed_modules_mapping, "vLLM")

    def _embedding(self, prefix: str) -> PackedLinear | None:
        """The input embedding. Half of the models give it no prefix: then it goes by its name."""
        if prefix in self.linears:
            return self.linears[prefix]
        named = [x for name, x in self.linears.items() if name.rpartition(".")[2] in EMBEDDINGS]
        return named[0] if len(named) == 1 else None
