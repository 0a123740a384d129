"""GPTQ checkpoints, as GPTQModel and vLLM read them. Torch-free.

    qweight  i32 [K b / 32, N]        codes, a stream of bits down the columns
    qzeros   i32 [G, N b / 32]        zero points in rows of bits; version 1 stores them less 1
    scales   f16 [G, N]
    g_idx    i32 [K]                  the group of each column

One width per linear; linears that differ from the common one are named by `dynamic` rules, those
that are not quantized first, because readers disagree on which of two rules wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from bitmill.formats.format import Facts, Refusal
from bitmill.formats.loading import VLLM, Runtime
from bitmill.formats.one_width import OneWidthFormat, group_size, width_of
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.model_plan import PlannedLinear

ALIGNED = 32
VLLM_BITS = {4, 8}


class GPTQCheckpoint(OneWidthFormat):
    """GPTQ safetensors (GPTQModel, vLLM), one width of 2, 3, 4 or 8 bits per linear.

    version: of the checkpoint; 1 cannot hold a zero point of 0, so it takes symmetric ones alone.
        onnxruntime-genai 0.18.0 reads 2 as if it were 1, all zero points one too high.
    symmetric: what vLLM needs.
    """

    name: ClassVar[str] = "gptq"
    codec: ClassVar[str] = "bitmill.formats.gptq.codec:GPTQCodec"
    legal: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    quant_method: ClassVar[str] = "gptq"

    version: Literal[1, 2] = 2

    @classmethod
    def loading(cls, settings: Mapping[str, Any]) -> tuple[Runtime, ...]:
        """Both, but vLLM takes symmetric ones of 4 and 8 bits alone."""
        own = settings[cls.config_key]
        rules = [own, *own.get("dynamic", {}).values()]
        found = {rule["bits"] for rule in rules if "bits" in rule}
        return cls._readers(own.get("sym") and found <= VLLM_BITS)

    def readers(self, facts: Facts) -> tuple[Runtime, ...]:
        """As `loading`, where any map leaves no other widths."""
        bits = {width_of([width], self.legal, self.symmetric) for width in facts.widths}
        return self._readers(self.symmetric and bits <= VLLM_BITS)

    @classmethod
    def _readers(cls, served: bool) -> tuple[Runtime, ...]:
        return tuple(one for one in cls.runtimes if one != VLLM or served)

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Linears whose sides are no multiples of 32, and zero points in version 1, beside what
        all formats of one width refuse."""
        found = super().refusals(facts)
        if self.version == 1 and not self.symmetric:
            found.append(
                Refusal("symmetric", "version 1 cannot hold a zero point of 0: set symmetric true")
            )
        for linear in facts.plan.linears:
            if linear.rows % ALIGNED or linear.columns % ALIGNED:
                found.append(
                    Refusal(
                        linear.name,
                        f"its sides {linear.rows} and {linear.columns} must be multiples of "
                        f"{ALIGNED}",
                    )
                )
                break
        return found

    def linear_tensors(self, name: str, linear: PlannedLinear, bits: int) -> list[TensorInfo]:
        """Four."""
        N, K = linear.rows, linear.columns
        groups = K // group_size(K)
        return [
            TensorInfo(f"{name}.qweight", "I32", (K * bits // 32, N)),
            TensorInfo(f"{name}.qzeros", "I32", (groups, N * bits // 32)),
            TensorInfo(f"{name}.scales", "F16", (groups, N)),
            TensorInfo(f"{name}.g_idx", "I32", (K,)),
        ]
