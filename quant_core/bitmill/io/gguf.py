"""Safe reading of GGUF headers: settings, and tensors under their Hugging Face names. Torch-free.

A GGUF file (versions 2 and 3, little-endian) is the magic "GGUF", u32 version, u64 tensor count,
u64 setting count, the settings (string key, u32 type, value) and per tensor a string name, u32
rank, u64 sizes (innermost first), u32 type, u64 offset. The `gguf` package parses every value into
numpy views, which takes seconds and trusts all counts; a plan needs few settings and must survive
strangers' files, so this reader bounds every count and skips what it does not need.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bitmill.errors import ModelError
from bitmill.io.safetensors import MAX_NAME, MAX_TENSORS, TensorInfo

_MAX_SETTINGS = 10_000
_MAX_ARRAY = 1 << 22
_MAX_STRING = 1 << 24
_MAX_RANK = 4

_SCALARS: Mapping[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

# GGUF settings, without the architecture's prefix -> config.json keys.
_SETTINGS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}

_BLOCK_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
GGUF_ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})
"""GGUF architectures with the names above."""

_BLOCK = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")


class TruncatedGguf(ModelError):
    """The file ends before its header does."""

    code = "bad_gguf"


@dataclass(frozen=True)
class GgufHeader:
    """settings: scalars, strings and the lengths of arrays; tensors: GGUF name -> shape [N, K]."""

    settings: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


class _Cursor:
    """Reads values in order and refuses to run past limits."""

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self._handle, self._path = handle, path
        self._size = path.stat().st_size

    def refuse(self, problem: str, kind: type[ModelError] = ModelError) -> ModelError:
        return kind(
            f"{self._path.name} is not a sound GGUF file: {problem}; fetch the file again",
            code="bad_gguf",
            param=self._path.name,
        )

    def take(self, count: int) -> bytes:
        data = self._handle.read(count)
        if len(data) < count:
            raise self.refuse(f"it is truncated at {self._size} bytes", TruncatedGguf)
        return data

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str, limit: int) -> int:
        value: int = self.scalar("<Q")
        if value > limit:
            raise self.refuse(f"{what} is {value}, the limit is {limit}")
        return value

    def string(self, limit: int = MAX_NAME) -> str:
        return self.take(self.count("a string's length", limit)).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A scalar or string; for an array its length."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string(_MAX_STRING)
        if kind != _ARRAY or depth > 1:
            raise self.refuse(f"a setting has the type {kind}")
        inner = self.scalar("<I")
        length = self.count("an array's length", _MAX_ARRAY)
        if inner in _SCALARS:
            self.take(length * struct.calcsize(_SCALARS[inner]))
        else:
            for _ in range(length):
                self.value(inner, depth + 1)
        return length

    def shape(self) -> tuple[int, ...]:
        rank = self.scalar("<I")
        if rank > _MAX_RANK:
            raise self.refuse(f"a tensor has {rank} axes, the limit is {_MAX_RANK}")
        inner_first = [self.count("a tensor's size", 1 << 32) for _ in range(rank)]
        self.scalar("<I")
        self.scalar("<Q")
        return tuple(reversed(inner_first))


def read_gguf_header(path: Path) -> GgufHeader:
    """Settings and tensor shapes of a GGUF file; `ModelError` (bad_gguf) names a defect."""
    if not path.is_file():
        raise ModelError(f"there is no file {path.name}", code="missing_file", param=path.name)
    with path.open("rb") as handle:
        cursor = _Cursor(handle, path)
        if cursor.take(4) != b"GGUF":
            raise cursor.refuse("it does not begin with GGUF")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise cursor.refuse(f"its version is {version}, readable are 2 and 3")
        tensor_count = cursor.count("the number of tensors", MAX_TENSORS)
        setting_count = cursor.count("the number of settings", _MAX_SETTINGS)
        settings: dict[str, Any] = {}
        for _ in range(setting_count):
            key = cursor.string()
            settings[key] = cursor.value(cursor.scalar("<I"))
        tensors: dict[str, tuple[int, ...]] = {}
        for _ in range(tensor_count):
            name = cursor.string()
            if name in tensors:
                raise cursor.refuse(f"tensor {name[:100]!r} appears twice")
            tensors[name] = cursor.shape()
    return GgufHeader(settings, tensors)


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """The config.json keys that a plan needs; raises `ModelError` for another architecture."""
    kind = header.settings.get("general.architecture")
    if kind not in GGUF_ARCHITECTURES:
        raise ModelError(
            f"GGUF architecture {str(kind)[:100]!r} is not supported; supported are "
            f"{', '.join(sorted(GGUF_ARCHITECTURES))}. Use the model's safetensors files",
            code="unsupported_architecture",
            param="general.architecture",
        )
    if "rope_freqs.weight" in header.tensors:
        raise ModelError(
            "the GGUF file rescales its rotary frequencies (rope_freqs.weight), which cannot be "
            "carried over; use the model's safetensors files",
            code="unsupported_architecture",
            param="rope_freqs.weight",
        )
    config: dict[str, Any] = {"model_type": kind}
    if header.settings.get("general.name") == "mistral" and kind == "llama":
        config["model_type"] = "mistral"
    for key, name in _SETTINGS.items():
        if f"{kind}.{key}" in header.settings:
            config[name] = header.settings[f"{kind}.{key}"]
    config.setdefault("vocab_size", header.settings.get("tokenizer.ggml.tokens"))
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    return config


def _hugging_face_name(name: str) -> str | None:
    if match := _BLOCK.fullmatch(name):
        module = _BLOCK_NAMES.get(match[2])
        return module and f"model.layers.{match[1]}.{module}.{match[3]}"
    outer, _, leaf = name.rpartition(".")
    module = _OUTER_NAMES.get(outer)
    return module and f"{module}.{leaf}"


def gguf_tensors(path: Path, header: GgufHeader) -> dict[str, TensorInfo]:
    """The tensors under their Hugging Face names, as float32: what conversion will write.

    Raises `ModelError` for a tensor without a counterpart.
    """
    result: dict[str, TensorInfo] = {}
    for name, shape in header.tensors.items():
        full = _hugging_face_name(name)
        if full is None:
            raise ModelError(
                f"{path.name} holds {name[:100]!r}, which has no counterpart in a Hugging Face "
                "model; use the model's safetensors files",
                code="unsupported_architecture",
                param=name[:100],
            )
        result[full] = TensorInfo(full, "F32", shape, path.name)
    return result
