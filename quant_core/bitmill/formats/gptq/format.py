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

from bitmill.formats.format import Contents, Facts, Format, Refusal
from bitmill.formats.one_width import group_size, refusals, stored_as, widths_of
from bitmill.io.safetensors import TensorInfo

QUANT_METHOD = "gptq"
LEGAL = (2, 3, 4, 8)
ALIGNED = 32


class GPTQCheckpoint(Format):
    """GPTQ safetensors (GPTQModel, vLLM), one width of 2, 3, 4 or 8 bits per linear.

    version: of the checkpoint; 1 cannot hold a zero point of 0, so it takes symmetric ones alone.
    symmetric: one zero point for all, in the middle, which vLLM needs; a bit more per code.
    fused: linears that read one input (q/k/v, gate/up) have one width.
    """

    name: ClassVar[str] = "gptq"
    codec: ClassVar[str] = "bitmill.formats.gptq.codec:GPTQCodec"

    version: Literal[1, 2] = 2
    symmetric: bool = False
    fused: bool = True

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """By the method that its quantization_config names."""
        found = settings.get("quantization_config")
        return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Linears whose sides are no multiples of 32, and zero points in version 1, beside what
        all formats of one width refuse."""
        found = super().refusals(facts) + refusals(facts, LEGAL, self.symmetric)
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

    def bits(self, contents: Contents) -> dict[str, int]:
        """The one width of each linear."""
        return widths_of(contents, LEGAL, fused=self.fused, symmetric=self.symmetric)

    def tensors(self, contents: Contents) -> list[TensorInfo]:
        """Four for each linear, then what is kept."""
        plan, bits = contents.plan, self.bits(contents)
        found = []
        for linear in plan.linears:
            N, K, b = linear.rows, linear.columns, bits[linear.name]
            name = stored_as(plan.model_type, linear.name)
            groups = K // group_size(K)
            found += [
                TensorInfo(f"{name}.qweight", "I32", (K * b // 32, N)),
                TensorInfo(f"{name}.qzeros", "I32", (groups, N * b // 32)),
                TensorInfo(f"{name}.scales", "F16", (groups, N)),
                TensorInfo(f"{name}.g_idx", "I32", (K,)),
            ]
        return found + [tensor.spec for tensor in plan.tensors]
