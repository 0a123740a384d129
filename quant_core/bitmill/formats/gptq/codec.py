"""Writing and reading GPTQ checkpoints (`formats/gptq/format.py`)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape
from bitmill.formats.format import Contents
from bitmill.formats.gptq.format import GPTQCheckpoint
from bitmill.formats.one_width import group_size, stored_as
from bitmill.formats.one_width_codes import (
    OneWidth,
    OneWidthCodec,
    OneWidthFolder,
    from_words,
    to_words,
)

VERSIONS = {1: "gptq", 2: "gptq_v2"}


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


@dataclass(frozen=True)
class GPTQFolder(OneWidthFolder):
    """A GPTQ checkpoint."""

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's weight f32 [N, K]: scale * (code - zero)."""
        config = self.settings["quantization_config"]
        name = stored_as(self.settings["model_type"], shape.name)
        own = config | config["dynamic"].get(f"+:{_exactly(name)}", {})
        bits = own["bits"]
        qweight, qzeros, scales = (
            self.tensor(f"{name}.{key}") for key in ("qweight", "qzeros", "scales")
        )
        codes = from_words(qweight.T, bits, shape.columns)
        zeros = from_words(qzeros, bits, shape.rows)
        if config["checkpoint_format"] == VERSIONS[1]:
            zeros = zeros + 1
        return OneWidth(codes, scales, zeros, own["group_size"]).dequantize()


class GPTQCodec(OneWidthCodec):
    """See `formats/codec.py`."""

    folder: ClassVar[type[OneWidthFolder]] = GPTQFolder

    def __init__(self, settings: GPTQCheckpoint) -> None:
        super().__init__(settings)
        self._version = settings.version

    def tensors(self, name: str, linear: OneWidth, bits: int) -> dict[str, Tensor]:
        """Codes and zero points in words, and the group of each column."""
        codes, zeros = linear.codes, linear.zeros
        if self._settings.symmetric:
            codes, zeros = linear.signed(bits), torch.full_like(zeros, 1 << (bits - 1))
        if self._version == 1:
            zeros = zeros - 1
        return {
            f"{name}.qweight": to_words(codes, bits).T.contiguous(),
            f"{name}.qzeros": to_words(zeros, bits),
            f"{name}.scales": linear.scales,
            f"{name}.g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // linear.size,
        }

    def config(self, contents: Contents, bits: dict[str, int]) -> dict[str, Any]:
        """The commonest scheme, and `dynamic` rules for linears that differ from it."""
        plan = contents.plan
        inside = f"{plan.block_prefix}."
        schemes = {one.name: (bits[one.name], group_size(one.columns)) for one in plan.linears}
        common, size = Counter(schemes.values()).most_common(1)[0][0]
        dynamic: dict[str, dict[str, int]] = {}
        for tensor in plan.tensors:
            name = tensor.name.removesuffix(".weight")
            if len(tensor.shape) == 2 and name != tensor.name and name.startswith(inside):
                dynamic[f"-:{_exactly(name)}"] = {}
        for linear in plan.linears:
            own = schemes[linear.name]
            if own != (common, size):
                rule = f"+:{_exactly(stored_as(plan.model_type, linear.name))}"
                dynamic[rule] = {"bits": own[0], "group_size": own[1]}
        version = VERSIONS[self._version]
        return {
            "quant_method": self._settings.quant_method,
            "bits": common,
            "group_size": size,
            "desc_act": False,
            "sym": self._settings.symmetric,
            "lm_head": False,
            "checkpoint_format": version,
            "format": version,
            "dynamic": dynamic,
        }
