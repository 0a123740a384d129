"""What a GGUF file says as a Hugging Face model: config.json and named tensors. Torch-free.

For every architecture, one function turns the header's keys into a configuration. It takes the keys
that it understands; a key that nobody took is refused by its name, unless its value says that
nothing is special. So rotary scaling, windows, soft caps and whatever comes next are carried or
refused, never dropped. Defaults and layouts are those of llama.cpp's loader and converter.

Tensors get the names of transformers' checkpoints, and an operation that undoes what the converter
did to their values (`models/convert_gguf.py` carries it out).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bitmill.errors import ModelError
from bitmill.io.gguf import GgufHeader, GgufTensor
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.architectures import ARCHITECTURES
from bitmill.plan.source_tensors import place_tensors

Operation = Literal[
    "as it is", "rotary", "minus one", "transposed", "bloom qkv", "falcon qkv", "element"
]
"""How a tensor's values are restored:

rotary: halves of each head's rows, which lie interleaved. minus one: norms of 1 + weight.
transposed: linears that transformers keeps [K, N]. bloom qkv, falcon qkv: rows of queries, keys and
values, which lie one after the other, by head or key head. element: place on the first axis.
"""

_BLOCK = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")
_FREQS, _LONG, _SHORT = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
ROTARY_FACTORS = (_FREQS, _LONG, _SHORT)
"""Tensors whose values go into config.json."""

_COMPUTED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
"""Tensors of old files that hold what the model computes itself."""


@dataclass(frozen=True)
class GgufPart:
    """A tensor of the converted model; heads: those of queries or keys, and keys, of a rotary or
    fused one; index: of an element."""

    info: TensorInfo
    stored: str
    operation: Operation = "as it is"
    heads: tuple[int, int] = (0, 0)
    index: int | None = None


@dataclass(frozen=True)
class GgufModel:
    """config: of config.json; parts: by name in the converted model."""

    config: dict[str, Any]
    parts: dict[str, GgufPart]


class Keys:
    """The settings under an architecture's prefix, each of which must be taken or say nothing."""

    def __init__(self, header: GgufHeader, prefix: str) -> None:
        self.header, self._prefix = header, prefix
        begin = prefix + "."
        self._values = {
            key.removeprefix(begin): value
            for key, value in header.settings.items()
            if key.startswith(begin)
        }
        self._taken: set[str] = set()
        self.tensors: set[str] = set()
        """Tensors that the configuration has taken over."""

    def take(self, name: str, default: Any = None) -> Any:
        """A value of any type."""
        self._taken.add(name)
        return self._values.get(name, default)

    def number(self, name: str, default: float | None = None) -> Any:
        """A number, or a list for every block of the same one; raises `ModelError` (bad_gguf)."""
        value = self.take(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            raise self.refuse(name, "it is missing from the header")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.refuse(name, f"{str(value)[:60]} is not one number for all blocks")
        return value

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor; `tensor` without ".weight" lies in the first block."""
        return tensor in self.header.tensors or f"blk.0.{tensor}" in self.header.tensors

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor; raises `ModelError` where it is missing."""
        if tensor not in self.header.tensors:
            raise self.refuse(tensor, "the file has no such tensor", key=False)
        return self.header.tensors[tensor].shape

    def refuse(self, name: str, problem: str, *, key: bool = True) -> ModelError:
        full = f"{self._prefix}.{name}" if key else name
        return ModelError(
            f"{self.header.path.name}: {full}: {problem}", code="bad_gguf", param=full
        )

    def check_all_taken(self) -> None:
        """Raise `ModelError` for the first setting that is neither understood nor neutral."""
        for name, value in self._values.items():
            if name in self._taken or name in _SAYS_NOTHING:
                continue
            if value not in _NEUTRAL.get(name, ()):
                raise ModelError(
                    f"{self.header.path.name}: its header says {self._prefix}.{name[:100]} = "
                    f"{str(value)[:60]}, which cannot be carried over: use the model's "
                    "safetensors files",
                    code="unsupported_architecture",
                    param=f"{self._prefix}.{name[:100]}",
                )


_SAYS_NOTHING = frozenset({"rope.scaling.finetuned", "tensor_data_layout", "vocab_size"})
"""Settings that do not change what a model computes."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "use_parallel_residual": (False,),
}
"""Values by which settings say that nothing is special."""


def _sizes(keys: Keys) -> dict[str, Any]:
    """What all architectures have; special tokens that the header lacks do not exist."""
    settings = keys.header.settings
    tokens = {
        "bos_token_id": settings.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": settings.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": settings.get("tokenizer.ggml.padding_token_id"),
    }
    if "tokenizer.ggml.unknown_token_id" in settings:
        tokens["unk_token_id"] = settings["tokenizer.ggml.unknown_token_id"]
    return tokens | {
        "vocab_size": keys.shape("token_embd.weight")[0],
        "hidden_size": keys.number("embedding_length"),
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": keys.number("attention.head_count"),
        "max_position_embeddings": keys.number("context_length"),
        "tie_word_embeddings": not keys.has("output.weight"),
    }


def _head_size(keys: Keys, sizes: Mapping[str, Any]) -> int:
    """Columns of a head, which keys and values must share."""
    usual = sizes["hidden_size"] // sizes["num_attention_heads"]
    size: int = keys.number("attention.key_length", usual)
    if keys.number("attention.value_length", usual) != size:
        raise keys.refuse("attention.value_length", f"it differs from the key length {size}")
    return size


def _rotary(keys: Keys, head: int, *, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters`; partial: whether transformers' model can rotate a part of each head."""
    rotated = keys.number("rope.dimension_count", head)
    if rotated != head and not partial:
        raise keys.refuse("rope.dimension_count", f"{rotated} of {head} columns are rotated")
    rope: dict[str, Any] = {"rope_theta": float(keys.number("rope.freq_base", 10000.0))}
    if partial:
        rope["partial_rotary_factor"] = rotated / head
    return rope | _scaling(keys, rope["rope_theta"], rotated)


def _scaling(keys: Keys, theta: float, rotated: int) -> dict[str, Any]:
    """The part of `rope_parameters` that depends on `rope.scaling.*` and factor tensors."""
    factor = keys.number("rope.scale_linear", 0)
    factor = keys.number("rope.scaling.factor", factor)
    kind = keys.take("rope.scaling.type", "linear" if factor not in (0, 1) else "none")
    stretch = keys.number("rope.scaling.attn_factor", 1)
    trained = keys.number("rope.scaling.original_context_length", 0)
    trained = trained or keys.number("context_length")
    if keys.has(_FREQS):
        if kind != "none":
            raise keys.refuse("rope.scaling.type", f"{kind!r} together with rotary factors")
        return _llama3(keys, theta, rotated)
    if keys.has(_LONG) or keys.has(_SHORT):
        if kind not in ("none", "longrope"):
            raise keys.refuse("rope.scaling.type", f"{kind!r} together with rotary factors")
        return {
            "rope_type": "longrope",
            "long_factor": _factors(keys, _LONG, rotated),
            "short_factor": _factors(keys, _SHORT, rotated),
            "original_max_position_embeddings": trained,
            "attention_factor": float(stretch),
        }
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": float(factor or 1),
            "original_max_position_embeddings": trained,
            "attention_factor": float(stretch * (0.1 * math.log(max(factor, 1)) + 1)),
            "beta_fast": float(keys.number("rope.scaling.yarn_beta_fast", 32)),
            "beta_slow": float(keys.number("rope.scaling.yarn_beta_slow", 1)),
        }
    if stretch != 1:
        raise keys.refuse("rope.scaling.attn_factor", f"{stretch} without scaling that uses it")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor or 1)}
    if kind != "none":
        raise keys.refuse("rope.scaling.type", f"{str(kind)[:60]!r} cannot be carried over")
    return {"rope_type": "default"}


def _factors(keys: Keys, name: str, rotated: int) -> list[float]:
    shape = keys.shape(name)
    if shape != (rotated // 2,):
        raise keys.refuse(name, f"its shape is {shape}, expected was ({rotated // 2},)", key=False)
    keys.tensors.add(name)
    return keys.header.floats(name)


def _llama3(keys: Keys, theta: float, rotated: int) -> dict[str, Any]:
    """Llama 3's scaling from the factors that it gives, with the published settings."""
    given = _factors(keys, _FREQS, rotated)
    if all(value == 1 for value in given):
        return {"rope_type": "default"}
    factor, low, high, original = max(given), 1.0, 4.0, 8192
    for i, value in enumerate(given):
        length = 2 * math.pi * theta ** (2 * i / rotated)
        smooth = min(max((original / length - low) / (high - low), 0.0), 1.0)
        if abs(value * ((1 - smooth) / factor + smooth) - 1) > 1e-4:
            raise keys.refuse(
                _FREQS,
                "the file rescales its rotary frequencies in another way than Llama 3, which "
                "cannot be carried over: use the model's safetensors files",
                key=False,
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _decoder(keys: Keys, *, partial: bool = False, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """What llama and its relatives have in common."""
    sizes = _sizes(keys)
    head = _head_size(keys, sizes)
    norm = "layer_norm_rms_epsilon" if eps == "rms_norm_eps" else "layer_norm_epsilon"
    return sizes | {
        "num_key_value_heads": keys.number("attention.head_count_kv", sizes["num_attention_heads"]),
        "head_dim": head,
        "intermediate_size": keys.number("feed_forward_length"),
        eps: float(keys.number(f"attention.{norm}")),
        "rope_parameters": _rotary(keys, head, partial=partial),
    }


def _llama(keys: Keys) -> dict[str, Any]:
    config = _decoder(keys)
    experts = keys.take("expert_count", 0)
    if experts:
        used = keys.number("expert_used_count")
        return config | {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "sliding_window": keys.take("attention.sliding_window") or None,
        }
    window = keys.take("attention.sliding_window", 0)
    if window:
        return config | {"model_type": "mistral", "sliding_window": window}
    attention = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
    mlp = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
    return config | {
        "model_type": "llama",
        "attention_bias": all(keys.has(name) for name in attention),
        "mlp_bias": all(keys.has(name) for name in mlp),
    }


def _qwen2(keys: Keys) -> dict[str, Any]:
    return _decoder(keys) | {"model_type": "qwen2"}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return _decoder(keys) | {"model_type": "qwen3"}


def _qwen3moe(keys: Keys) -> dict[str, Any]:
    gate = keys.take("expert_gating_func", 1)
    if gate not in (0, 1):
        raise keys.refuse("expert_gating_func", f"{gate} is not 1, softmax")
    if keys.take("expert_weights_norm", True) is not True:
        raise keys.refuse("expert_weights_norm", "the experts' weights are always normalized here")
    return _decoder(keys) | {
        "model_type": "qwen3_moe",
        "num_experts": keys.number("expert_count"),
        "num_experts_per_tok": keys.number("expert_used_count"),
        "moe_intermediate_size": keys.number("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _gemma(keys: Keys, largest: int, period: int, window: int) -> dict[str, Any]:
    """largest: blocks of the one size that scales attention by the model's width, not a head's.

    period: every period-th block sees all tokens, the others a window.
    """
    config = _decoder(keys)
    blocks = config["num_hidden_layers"]
    window = keys.number("attention.sliding_window", window)
    pattern = keys.take("attention.sliding_window_pattern", period)
    if isinstance(pattern, int):
        pattern = [(i + 1) % pattern != 0 for i in range(blocks)] if pattern else [False] * blocks
    if not isinstance(pattern, list) or len(pattern) != blocks:
        raise keys.refuse("attention.sliding_window_pattern", f"{str(pattern)[:60]}")
    wide = blocks == largest
    scalar = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    if scale := keys.number("attention.scale", 0):
        scalar = round(scale**-2)
        if abs(scalar**-0.5 / scale - 1) > 1e-5:
            raise keys.refuse("attention.scale", f"{scale} is no whole number's 1 / sqrt(n)")
    return config | {
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or None,
        "layer_types": [
            "sliding_attention" if window and inside else "full_attention" for inside in pattern
        ],
    }


def _gemma2(keys: Keys) -> dict[str, Any]:
    return _gemma(keys, largest=46, period=2, window=4096) | {
        "model_type": "gemma2",
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30) or None,
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    config = _gemma(keys, largest=62, period=6, window=0)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return config | {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0) or None,
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": local,
        },
    }


def _phi3(keys: Keys) -> dict[str, Any]:
    config = _decoder(keys, partial=True)
    positions = config["max_position_embeddings"]
    trained = keys.number("rope.scaling.original_context_length", positions)
    return config | {
        "model_type": "phi3",
        "original_max_position_embeddings": trained,
        "sliding_window": keys.take("attention.sliding_window") or None,
    }


def _stablelm(keys: Keys) -> dict[str, Any]:
    config = _decoder(keys, partial=True, eps="layer_norm_eps")
    parallel = not keys.has("ffn_norm.weight")
    if keys.take("use_parallel_residual", parallel) is not parallel:
        raise keys.refuse("use_parallel_residual", "the tensors say otherwise")
    del config["head_dim"]
    return config | {
        "model_type": "stablelm",
        "use_qkv_bias": keys.has("attn_q.bias"),
        "qk_layernorm": keys.has("attn_q_norm.weight"),
        "use_parallel_residual": parallel,
    }


def _starcoder2(keys: Keys) -> dict[str, Any]:
    return _decoder(keys, eps="norm_epsilon") | {
        "model_type": "starcoder2",
        "use_bias": keys.has("attn_q.bias"),
        "sliding_window": keys.take("attention.sliding_window") or None,
    }


def _falcon(keys: Keys) -> dict[str, Any]:
    config = _sizes(keys)
    heads = config["num_attention_heads"]
    key_heads = keys.number("attention.head_count_kv", heads)
    two_norms = keys.has("attn_norm_2.weight")
    head = _head_size(keys, config)
    return config | {
        "model_type": "falcon",
        "num_kv_heads": key_heads,
        "ffn_hidden_size": keys.number("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "new_decoder_architecture": key_heads != 1 or two_norms,
        "multi_query": True,
        "parallel_attn": True,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "bias": keys.has("attn_qkv.bias"),
        "alibi": False,
        "rope_parameters": _rotary(keys, head),
    }


def _bloom(keys: Keys) -> dict[str, Any]:
    config = _whole_heads(keys, _sizes(keys))
    if keys.number("attention.max_alibi_bias", 8) != 8:
        raise keys.refuse("attention.max_alibi_bias", "it is 8 in transformers' model")
    if keys.number("feed_forward_length") != 4 * config["hidden_size"]:
        raise keys.refuse("feed_forward_length", f"not 4 times {config['hidden_size']}")
    positions = config.pop("max_position_embeddings")
    return config | {
        "model_type": "bloom",
        "n_layer": config.pop("num_hidden_layers"),
        "n_head": config.pop("num_attention_heads"),
        "seq_length": positions,
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
    }


def _gpt2(keys: Keys) -> dict[str, Any]:
    config = _whole_heads(keys, _sizes(keys))
    return config | {
        "model_type": "gpt2",
        "n_embd": config.pop("hidden_size"),
        "n_layer": config.pop("num_hidden_layers"),
        "n_head": config.pop("num_attention_heads"),
        "n_positions": config.pop("max_position_embeddings"),
        "n_inner": keys.number("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
    }


def _whole_heads(keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes, of a model whose heads share its width and have keys of their own."""
    heads, head = sizes["num_attention_heads"], _head_size(keys, sizes)
    if head * heads != sizes["hidden_size"]:
        raise keys.refuse("attention.key_length", f"{head} times {heads} is not the model's width")
    if keys.number("attention.head_count_kv", heads) != heads:
        raise keys.refuse("attention.head_count_kv", f"it is not {heads}")
    return sizes


_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = _LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_FALCON = {
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_BERTLIKE_OUTER = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}


@dataclass(frozen=True)
class GgufArchitecture:
    """One `general.architecture`.

    config: from its keys. inside: name in a block -> module of transformers' block, with {} for the
    place on the tensor's first axis. outside: the same for the rest. operations: by name, all norms
    under "norm".
    """

    config: Callable[[Keys], dict[str, Any]]
    inside: Mapping[str, str]
    outside: Mapping[str, str] = field(
        default_factory=lambda: {
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
        }
    )
    operations: Mapping[str, Operation] = field(default_factory=dict)


GGUF_ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        _llama, _LLAMA | _MIXTRAL, operations={"attn_q": "rotary", "attn_k": "rotary"}
    ),
    "qwen2": GgufArchitecture(_qwen2, _LLAMA),
    "qwen3": GgufArchitecture(_qwen3, _LLAMA | _HEAD_NORMS),
    "qwen3moe": GgufArchitecture(_qwen3moe, _LLAMA | _HEAD_NORMS | _EXPERTS),
    "gemma2": GgufArchitecture(_gemma2, _GEMMA, operations={"norm": "minus one"}),
    "gemma3": GgufArchitecture(_gemma3, _GEMMA | _HEAD_NORMS, operations={"norm": "minus one"}),
    "phi3": GgufArchitecture(
        _phi3, _LLAMA | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    ),
    "stablelm": GgufArchitecture(
        _stablelm,
        _LLAMA
        | {
            "attn_q_norm": "self_attn.q_layernorm.norms.{}",
            "attn_k_norm": "self_attn.k_layernorm.norms.{}",
        },
    ),
    "starcoder2": GgufArchitecture(
        _starcoder2, _LLAMA | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    ),
    "falcon": GgufArchitecture(
        _falcon,
        _FALCON | {"attn_norm": "input_layernorm", "attn_norm_2": "ln_attn"},
        _BERTLIKE_OUTER,
        {"attn_qkv": "falcon qkv"},
    ),
    "bloom": GgufArchitecture(
        _bloom,
        _FALCON | {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        _BERTLIKE_OUTER,
        {"attn_qkv": "bloom qkv"},
    ),
    "gpt2": GgufArchitecture(
        _gpt2,
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transposed"),
    ),
}


def read_model(header: GgufHeader) -> GgufModel:
    """The configuration and tensors that a GGUF file describes.

    Raises `ModelError` for an architecture, setting or tensor that cannot be carried over, by name:
    unsupported_architecture, bad_gguf, split_gguf, or what `place_tensors` raises.
    """
    header.check_extent()
    _refuse_other_files(header)
    kind = str(header.settings.get("general.architecture"))
    found = GGUF_ARCHITECTURES.get(kind)
    if found is None:
        raise ModelError(
            f"GGUF architecture {kind[:100]!r} is not supported; supported are "
            f"{', '.join(sorted(GGUF_ARCHITECTURES))}. Use the model's safetensors files",
            code="unsupported_architecture",
            param="general.architecture",
        )
    keys = Keys(header, kind)
    config = found.config(keys)
    keys.check_all_taken()
    model = ARCHITECTURES[config["model_type"]]
    parameters = model.parameters(config)
    parts: dict[str, GgufPart] = {}
    for stored, tensor in header.tensors.items():
        if stored in keys.tensors or _COMPUTED.fullmatch(stored):
            continue
        made = list(_parts(stored, tensor, found, config))
        if not made or any(model.renamed(part.info.name) not in parameters.shapes for part in made):
            raise ModelError(
                f"{header.path.name} holds {stored[:100]!r}, which has no counterpart in a "
                f"{config['model_type']} model of this header: use the model's safetensors files",
                code="bad_gguf",
                param=stored[:100],
            )
        parts |= {part.info.name: part for part in made}
    place_tensors((part.info for part in parts.values()), model, parameters)
    return GgufModel(config, parts)


def _refuse_other_files(header: GgufHeader) -> None:
    name = header.path.name
    count = header.settings.get("split.count", 1)
    if count not in (0, 1):
        number = header.settings.get("split.no", 0)
        raise ModelError(
            f"{name} is part {number + 1} of {count} of a split GGUF file, which is not read: "
            f"join the parts first (llama-gguf-split --merge {name} whole.gguf)",
            code="split_gguf",
            param=name,
        )
    kind = header.settings.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            f"{name} holds no model but {str(kind)[:60]!r} (general.type)",
            code="bad_gguf",
            param="general.type",
        )


def _parts(
    stored: str, tensor: GgufTensor, found: GgufArchitecture, config: Mapping[str, Any]
) -> Iterator[GgufPart]:
    """What a stored tensor becomes; nothing where the architecture does not know its name."""
    path, name, leaf = _place(stored, found, config)
    if path is None:
        return
    if "{}" in path:
        for index in range(tensor.shape[0] if len(tensor.shape) > 1 else 0):
            info = TensorInfo(f"{path.format(index)}.{leaf}", "F32", tensor.shape[1:])
            yield GgufPart(info, stored, "element", index=index)
        return
    kind = "norm" if name.endswith("norm") else name
    operation = found.operations.get(kind, "as it is")
    shape = tensor.shape
    if operation == "transposed":
        operation, shape = (operation, shape[::-1]) if leaf == "weight" else ("as it is", shape)
    yield GgufPart(
        TensorInfo(f"{path}.{leaf}", "F32", shape), stored, operation, _heads(name, config)
    )


def _place(
    stored: str, found: GgufArchitecture, config: Mapping[str, Any]
) -> tuple[str | None, str, str]:
    """(module path or None, GGUF's name for it, weight or bias) of a tensor."""
    blocks = ARCHITECTURES[config["model_type"]].blocks
    if match := _BLOCK.fullmatch(stored):
        index, name, leaf = match.groups()
        inside = dict(found.inside)
        if config.get("num_ln_in_parallel_attn") == 2:
            inside["attn_norm"] = "ln_mlp"
        module = inside.get(name)
        return module and f"{blocks}.{int(index)}.{module}", name, leaf
    name, _, leaf = stored.rpartition(".")
    return (found.outside.get(name) if leaf in ("weight", "bias") else None), name, leaf


def _heads(name: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """(heads of the tensor, or of queries; of keys)."""
    queries = config.get("num_attention_heads") or config.get("n_head") or 0
    keys = config.get("num_key_value_heads") or config.get("num_kv_heads") or queries
    return (keys if name == "attn_k" else queries), keys
