"""GGUF files, as llama.cpp and transformers read them. Torch-free.

    Q4_0  18 bytes per 32 weights    scale f16, codes of 4 bits: w = scale * (code - 8)
    Q5_0  22                         w = scale * (code - 16)
    Q8_0  34                         w = scale * code, -128..127

Groups of up to 3 bits fit Q4_0, of 4 bits (and of 1) Q5_0, of 5 to 7 bits Q8_0, each with its own
scale: nothing is lost. What was not quantized keeps its dtype; vectors become F32, as llama.cpp
wants them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitmill.config.bit_width_map import DROPPED
from bitmill.formats.format import Contents, Facts, Format, Refusal
from bitmill.formats.gguf.header import (
    FREQUENCIES,
    NAMES,
    differences,
    frequencies,
    stored_name,
)
from bitmill.formats.loading import Runtime
from bitmill.formats.one_width import refusals, width_of, widths_of
from bitmill.io.gguf import TYPES
from bitmill.io.safetensors import TensorInfo

LEGAL = (4, 5, 8)
TYPE_OF = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
BLOCK = 32
ALIGNMENT = 32
FILE_NAME = "model.gguf"
LLAMA_CPP = Runtime(
    "llama.cpp",
    """llama.cpp:
```sh
llama-cli -hf REPO
```""",
)
FROM_FILE = Runtime(
    "transformers",
    f"""transformers, which dequantizes it:
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("REPO", gguf_file="{FILE_NAME}")
```""",
)
_BLOCKS = {name: (weights, size) for name, weights, size in TYPES.values()}


@dataclass(frozen=True)
class GgufInfo(TensorInfo):
    """A tensor of a GGUF file: dtype is one of `TYPES`, shape in weights, outermost axis first."""

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        weights, size = _BLOCKS[self.dtype]
        return math.prod(self.shape) // weights * size


class Gguf(Format):
    """GGUF in blocks of 32 weights (llama.cpp): Q4_0, Q5_0 or Q8_0 per linear, values as they are.

    pretokenizer: how text is cut before its tokens are found, in llama.cpp's word
    (tokenizer.ggml.pre), e.g. "llama-bpe" or "smollm"; None for the usual one of the model.
    tokenizer: whether the file has one; llama.cpp needs it.
    """

    name: ClassVar[str] = "gguf"
    codec: ClassVar[str] = "bitmill.formats.gguf.codec:GgufCodec"
    widths: ClassVar[frozenset[int]] = frozenset({DROPPED, 1, 2, 3, 4, 5, 6, 7})

    library: ClassVar[str] = "gguf"
    runtimes: ClassVar[tuple[Runtime, ...]] = (LLAMA_CPP, FROM_FILE)

    pretokenizer: str | None = None
    tokenizer: bool = True

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """A folder of one file has no config.json."""
        return False

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Architectures and settings that a header cannot carry, and rows that are no whole
        blocks, beside what all formats of one width refuse."""
        kind = facts.plan.model_type
        if kind not in NAMES:
            known = ", ".join(sorted(NAMES))
            return [Refusal(kind, f"models of this type are not written, only {known}")]
        found = super().refusals(facts) + refusals(facts, LEGAL, symmetric=True)
        for linear in facts.plan.linears:
            if linear.columns % BLOCK:
                found.append(
                    Refusal(linear.name, f"its {linear.columns} columns are no blocks of {BLOCK}")
                )
                break
        if facts.config:
            shapes = {stored_name(kind, t.name): t.shape for t in facts.plan.tensors}
            for linear in facts.plan.linears:
                stored = stored_name(kind, f"{linear.name}.weight")
                shapes[stored] = (linear.rows, linear.columns)
            found += [Refusal("config.json", why) for why in differences(facts.config, shapes)]
        return found

    def takes(self, width: int) -> bool:
        """Whether a type without zero points holds it."""
        return width_of([width], LEGAL, symmetric=True) is not None

    def bits(self, contents: Contents) -> dict[str, int]:
        """The one width of each linear, a key of `TYPE_OF`."""
        return widths_of(contents, LEGAL, fused=False, symmetric=True)

    def tensors(self, contents: Contents) -> list[TensorInfo]:
        """In the order of the file: linears, what is kept, rotary factors."""
        plan, bits = contents.plan, self.bits(contents)
        found: list[TensorInfo] = [
            GgufInfo(
                stored_name(plan.model_type, f"{one.name}.weight"),
                TYPE_OF[bits[one.name]],
                (one.rows, one.columns),
            )
            for one in plan.linears
        ]
        for tensor in plan.tensors:
            dtype = "F32" if len(tensor.shape) == 1 else tensor.dtype
            found.append(GgufInfo(stored_name(plan.model_type, tensor.name), dtype, tensor.shape))
        if factors := frequencies(contents.config):
            found.append(GgufInfo(FREQUENCIES, "F32", (len(factors),)))
        return found

    def file_bytes(self, contents: Contents) -> int:
        """Bytes of the file behind its header, whose length the tokenizer decides."""
        return sum(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in self.tensors(contents))
