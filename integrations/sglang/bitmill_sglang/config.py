"""`quantization_config` as SGLang asks for it: which method computes which layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import Tensor, nn

from bitmill.errors import FormatError
from bitmill.formats.packed.complete import check_complete
from bitmill.formats.packed.config import QUANT_METHOD, PackedConfig, PackedLinear
from bitmill.inference.engine_layers import joined_parts

JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What SGLang's decoders join; a model may say otherwise."""
_SGLANGS_OWN = ("packed_modules_mapping", "hf_config")
"""Keys that SGLang adds to the checkpoint's `quantization_config`."""


class BitmillConfig(QuantizationConfig):
    """The quantized linears of a checkpoint under the names that SGLang's model gives them.

    orders: column orders i32 [K] by name, put here by the layers that own them
    """

    def __init__(self, packed: PackedConfig, joined: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.linears: dict[str, PackedLinear] = dict(packed.linears)
        self.joined = JOINED | (joined or {})
        self.orders: dict[str, Tensor] = {}

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

    def get_scaled_act_names(self) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitmillConfig:
        """SGLang counts no tensors, so a folder with one too few or too many is refused here."""
        own = {name: value for name, value in config.items() if name not in _SGLANGS_OWN}
        place = getattr(config.get("hf_config"), "_name_or_path", "")
        if place and Path(place).is_dir():
            check_complete(Path(place))
        return cls(PackedConfig.from_dict(own), config.get("packed_modules_mapping"))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from bitmill_sglang.layers import BitmillEmbeddingMethod, BitmillLinearMethod

        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            return BitmillLinearMethod(self, parts) if parts else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):  # heads too
            linear = self.linears.get(prefix)
            return None if linear is None else BitmillEmbeddingMethod(self, linear)
        if "expert" in prefix and any(name.startswith(f"{prefix}.") for name in self.linears):
            raise FormatError(f"{prefix}: SGLang cannot serve packed experts yet", param=prefix)
        return None

    def _parts(self, prefix: str) -> list[PackedLinear]:
        """The linears that a layer is made of, in the order of its outputs."""
        if prefix in self.linears:  # the checkpoint itself may join them
            return [self.linears[prefix]]
        return joined_parts(self.linears, prefix, self.joined, "SGLang")
