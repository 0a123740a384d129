"""Names and shapes of a model's parameters, from the values of its config.json alone. Torch-free.

One function per architecture, after the modules of transformers, whose own skeletons the tests hold
them against. Names are those of transformers' module tree; linears are [N, K], a Conv1D's weight is
[K, N]. Stacked experts are listed one by one, as `...experts.{e}.{gate_proj,up_proj,down_proj}`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bitmill.errors import ModelError
from bitmill.io.bounded_json import shown

MAX_PARAMETERS = 500_000
HEAD_WEIGHT = "lm_head.weight"
_MAX_SIZE = 1 << 24

Shape = tuple[int, ...]
Shapes = Iterator[tuple[str, Shape]]


@dataclass(frozen=True)
class Parameters:
    """All parameters of a causal language model by their name in transformers' module tree.

    tied: `embedding` and `HEAD_WEIGHT` are one matrix, of which a checkpoint may lack either name.
    """

    shapes: Mapping[str, Shape]
    embedding: str
    tied: bool

    def missing(self, found: Container[str]) -> list[str]:
        """Parameters that are not in `found` and cannot be told from another, in order."""
        pair = (self.embedding, HEAD_WEIGHT) if self.tied else ()
        lacks = [name for name in self.shapes if name not in found]
        return [name for name in lacks if name not in pair or not any(p in found for p in pair)]


class Settings:
    """Values of a config.json as transformers reads them: null counts as absent."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def size(self, *names: str, default: int | None = None) -> int:
        """The first value given under one of `names`.

        Raises `ModelError` where it is no whole number from 1 to 2^24, or absent without a default.
        """
        for name in names:
            value = self._config.get(name)
            if value is not None:
                if type(value) is not int or not 1 <= value <= _MAX_SIZE:
                    raise _bad(name, f"{name} is {shown(value)}, accepted are 1 to {_MAX_SIZE}")
                return value
        if default is None:
            raise _bad(names[0], f"it has none of {', '.join(names)}")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        """A yes or no; numbers count as they do in Python."""
        value = self._config.get(name)
        return default if value is None else bool(value)

    def list(self, name: str) -> list[Any]:
        """A list, empty where it is absent."""
        value = self._config.get(name)
        if value is not None and not isinstance(value, list):
            raise _bad(name, f"{name} is {shown(value)}, accepted is a list")
        return value or []

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return self.size("num_hidden_layers", "n_layer")

    @property
    def vocabulary(self) -> int:
        """Rows of embedding and head."""
        return self.size("vocab_size")


def _bad(name: str, problem: str) -> ModelError:
    return ModelError(f"config.json: {problem}", code="bad_config", param=name)


def _linear(path: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    yield f"{path}.weight", (rows, columns)
    if bias:
        yield f"{path}.bias", (rows,)


def _conv1d(path: str, rows: int, columns: int) -> Shapes:
    yield f"{path}.weight", (columns, rows)
    yield f"{path}.bias", (rows,)


def _norm(path: str, size: int, bias: bool = False) -> Shapes:
    yield f"{path}.weight", (size,)
    if bias:
        yield f"{path}.bias", (size,)


def _attention(
    block: str, hidden: int, heads: tuple[int, int, int], bias: bool, out_bias: bool
) -> Shapes:
    """heads: queries, keys and values, columns of a head."""
    queries, keys, columns = heads
    yield from _linear(f"{block}.self_attn.q_proj", queries * columns, hidden, bias)
    yield from _linear(f"{block}.self_attn.k_proj", keys * columns, hidden, bias)
    yield from _linear(f"{block}.self_attn.v_proj", keys * columns, hidden, bias)
    yield from _linear(f"{block}.self_attn.o_proj", hidden, queries * columns, out_bias)


def _gated(path: str, hidden: int, inner: int, bias: bool = False) -> Shapes:
    yield from _linear(f"{path}.gate_proj", inner, hidden, bias)
    yield from _linear(f"{path}.up_proj", inner, hidden, bias)
    yield from _linear(f"{path}.down_proj", hidden, inner, bias)


def _experts(block: str, hidden: int, inner: int, count: int) -> Shapes:
    yield f"{block}.mlp.gate.weight", (count, hidden)
    for expert in range(count):
        yield from _gated(f"{block}.mlp.experts.{expert}", hidden, inner)


def _head_norms(block: str, columns: int) -> Shapes:
    yield from _norm(f"{block}.self_attn.q_norm", columns)
    yield from _norm(f"{block}.self_attn.k_norm", columns)


def _two_norms(block: str, hidden: int, bias: bool = False) -> Shapes:
    yield from _norm(f"{block}.input_layernorm", hidden, bias)
    yield from _norm(f"{block}.post_attention_layernorm", hidden, bias)


def _decoder(
    s: Settings, hidden: int, block: Callable[[int, str], Shapes], norm_bias: bool = False
) -> Shapes:
    """What most architectures have in common: `model.embed_tokens`, `.layers`, `.norm`, a head."""
    yield "model.embed_tokens.weight", (s.vocabulary, hidden)
    for i in range(s.blocks):
        yield from block(i, f"model.layers.{i}")
    yield from _norm("model.norm", hidden, norm_bias)
    yield "lm_head.weight", (s.vocabulary, hidden)


def llama(s: Settings) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=32)
    inner = s.size("intermediate_size", default=11008)
    keys = s.size("num_key_value_heads", default=heads)
    columns = s.size("head_dim", default=hidden // heads)
    bias = s.flag("attention_bias")

    def block(_: int, path: str) -> Shapes:
        yield from _attention(path, hidden, (heads, keys, columns), bias, bias)
        yield from _gated(f"{path}.mlp", hidden, inner, s.flag("mlp_bias"))
        yield from _two_norms(path, hidden)

    yield from _decoder(s, hidden, block)


def mistral(s: Settings) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=32)
    inner = s.size("intermediate_size", default=14336)
    keys = s.size("num_key_value_heads", default=8)
    columns = s.size("head_dim", default=hidden // heads)

    def block(_: int, path: str) -> Shapes:
        yield from _attention(path, hidden, (heads, keys, columns), False, False)
        yield from _gated(f"{path}.mlp", hidden, inner)
        yield from _two_norms(path, hidden)

    yield from _decoder(s, hidden, block)


def mixtral(s: Settings) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=32)
    inner = s.size("intermediate_size", default=14336)
    keys = s.size("num_key_value_heads", default=8)
    columns = s.size("head_dim", default=hidden // heads)
    count = s.size("num_local_experts", "num_experts", default=8)

    def block(_: int, path: str) -> Shapes:
        yield from _attention(path, hidden, (heads, keys, columns), False, False)
        yield from _experts(path, hidden, inner, count)
        yield from _two_norms(path, hidden)

    yield from _decoder(s, hidden, block)


def qwen2(s: Settings) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=32)
    inner = s.size("intermediate_size", default=22016)
    keys = s.size("num_key_value_heads", default=32)
    columns = s.size("head_dim", default=hidden // heads)

    def block(_: int, path: str) -> Shapes:
        yield from _attention(path, hidden, (heads, keys, columns), True, False)
        yield from _gated(f"{path}.mlp", hidden, inner)
        yield from _two_norms(path, hidden)

    yield from _decoder(s, hidden, block)


def qwen3(s: Settings) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=32)
    inner = s.size("intermediate_size", default=22016)
    keys = s.size("num_key_value_heads", default=32)
    columns = s.size("head_dim", default=128)
    bias = s.flag("attention_bias")

    def block(_: int, path: str) -> Shapes:
        yield from _attention(path, hidden, (heads, keys, columns), bias, bias)
        yield from _head_norms(path, columns)
        yield from _gated(f"{path}.mlp", hidden, inner)
        yield from _two_norms(path, hidden)

    yield from _decoder(s, hidden, block)


def qwen3_moe(s: Settings) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=32)
    inner = s.size("intermediate_size", default=6144)
    expert = s.size("moe_intermediate_size", default=768)
    keys = s.size("num_key_value_heads", default=4)
    columns = s.size("head_dim", default=hidden // heads)
    count = s.size("num_experts", "num_local_experts", default=128)
    step, dense = s.size("decoder_sparse_step", default=1), s.list("mlp_only_layers")
    bias = s.flag("attention_bias")

    def block(i: int, path: str) -> Shapes:
        yield from _attention(path, hidden, (heads, keys, columns), bias, bias)
        yield from _head_norms(path, columns)
        if i in dense or (i + 1) % step:
            yield from _gated(f"{path}.mlp", hidden, inner)
        else:
            yield from _experts(path, hidden, expert, count)
        yield from _two_norms(path, hidden)

    yield from _decoder(s, hidden, block)


def _gemma(s: Settings, head_norms: bool) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=8)
    inner = s.size("intermediate_size", default=9216)
    keys = s.size("num_key_value_heads", default=4)
    columns = s.size("head_dim", default=256)
    bias = s.flag("attention_bias")

    def block(_: int, path: str) -> Shapes:
        yield from _attention(path, hidden, (heads, keys, columns), bias, bias)
        if head_norms:
            yield from _head_norms(path, columns)
        yield from _gated(f"{path}.mlp", hidden, inner)
        yield from _two_norms(path, hidden)
        yield from _norm(f"{path}.pre_feedforward_layernorm", hidden)
        yield from _norm(f"{path}.post_feedforward_layernorm", hidden)

    yield from _decoder(s, hidden, block)


def gemma2(s: Settings) -> Shapes:
    return _gemma(s, head_norms=False)


def gemma3_text(s: Settings) -> Shapes:
    return _gemma(s, head_norms=True)


def phi3(s: Settings) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=32)
    inner = s.size("intermediate_size", default=8192)
    keys = s.size("num_key_value_heads", default=heads)
    columns = s.size("head_dim", default=hidden // heads)

    def block(_: int, path: str) -> Shapes:
        yield from _linear(f"{path}.self_attn.qkv_proj", (heads + 2 * keys) * columns, hidden)
        yield from _linear(f"{path}.self_attn.o_proj", hidden, heads * columns)
        yield from _linear(f"{path}.mlp.gate_up_proj", 2 * inner, hidden)
        yield from _linear(f"{path}.mlp.down_proj", hidden, inner)
        yield from _two_norms(path, hidden)

    yield from _decoder(s, hidden, block)


def stablelm(s: Settings) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=32)
    inner = s.size("intermediate_size", default=6912)
    keys = s.size("num_key_value_heads", default=32)
    columns = hidden // heads

    def block(_: int, path: str) -> Shapes:
        bias = s.flag("use_qkv_bias")
        yield from _attention(path, hidden, (heads, keys, columns), bias, False)
        if s.flag("qk_layernorm"):
            for name, count in (("q", heads), ("k", keys)):
                for head in range(count):
                    yield from _norm(f"{path}.self_attn.{name}_layernorm.norms.{head}", columns)
        yield from _gated(f"{path}.mlp", hidden, inner)
        yield from _norm(f"{path}.input_layernorm", hidden, bias=True)
        if not s.flag("use_parallel_residual"):
            yield from _norm(f"{path}.post_attention_layernorm", hidden, bias=True)

    yield from _decoder(s, hidden, block, norm_bias=True)


def starcoder2(s: Settings) -> Shapes:
    hidden, heads = s.size("hidden_size"), s.size("num_attention_heads", default=24)
    inner = s.size("intermediate_size", default=12288)
    keys = s.size("num_key_value_heads", default=2)
    columns = s.size("head_dim", default=hidden // heads)
    bias = s.flag("use_bias", default=True)

    def block(_: int, path: str) -> Shapes:
        yield from _attention(path, hidden, (heads, keys, columns), bias, bias)
        yield from _linear(f"{path}.mlp.c_fc", inner, hidden, bias)
        yield from _linear(f"{path}.mlp.c_proj", hidden, inner, bias)
        yield from _two_norms(path, hidden, bias=True)

    yield from _decoder(s, hidden, block, norm_bias=True)


def opt(s: Settings) -> Shapes:
    hidden, inner = s.size("hidden_size"), s.size("ffn_dim", default=3072)
    word = s.size("word_embed_proj_dim", default=hidden)
    positions = s.size("max_position_embeddings", default=2048) + 2
    bias = s.flag("enable_bias", default=True)
    affine = s.flag("layer_norm_elementwise_affine", default=True)

    def norm(path: str) -> Shapes:
        return _norm(path, hidden, bias=True) if affine else iter(())

    yield "model.decoder.embed_tokens.weight", (s.vocabulary, word)
    yield "model.decoder.embed_positions.weight", (positions, hidden)
    if word != hidden:
        yield "model.decoder.project_in.weight", (hidden, word)
        yield "model.decoder.project_out.weight", (word, hidden)
    for i in range(s.blocks):
        path = f"model.decoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{path}.self_attn.{name}", hidden, hidden, bias)
        yield from norm(f"{path}.self_attn_layer_norm")
        yield from _linear(f"{path}.fc1", inner, hidden, bias)
        yield from _linear(f"{path}.fc2", hidden, inner, bias)
        yield from norm(f"{path}.final_layer_norm")
    if s.flag("do_layer_norm_before", default=True) and not s.flag("_remove_final_layer_norm"):
        yield from norm("model.decoder.final_layer_norm")
    yield "lm_head.weight", (s.vocabulary, word)


def falcon(s: Settings) -> Shapes:
    hidden = s.size("n_embed", "hidden_size")
    heads = s.size("num_attention_heads", default=71)
    keys = s.size("num_kv_heads", default=heads)
    inner = s.size("ffn_hidden_size", default=4 * hidden)
    columns = hidden // heads
    grouped, bias = s.flag("new_decoder_architecture"), s.flag("bias")
    parallel = s.flag("parallel_attn", default=True)
    norms = s.size("num_ln_in_parallel_attn", default=2 if grouped else 1)
    if grouped:
        fused = (heads + 2 * keys) * columns
    else:
        fused = hidden + 2 * columns if s.flag("multi_query", default=True) else 3 * hidden

    yield "transformer.word_embeddings.weight", (s.vocabulary, hidden)
    for i in range(s.blocks):
        path = f"transformer.h.{i}"
        yield from _linear(f"{path}.self_attention.query_key_value", fused, hidden, bias)
        yield from _linear(f"{path}.self_attention.dense", hidden, hidden, bias)
        yield from _linear(f"{path}.mlp.dense_h_to_4h", inner, hidden, bias)
        yield from _linear(f"{path}.mlp.dense_4h_to_h", hidden, inner, bias)
        if not parallel:
            yield from _two_norms(path, hidden, bias=True)
        elif norms == 2:
            yield from _norm(f"{path}.ln_attn", hidden, bias=True)
            yield from _norm(f"{path}.ln_mlp", hidden, bias=True)
        else:
            yield from _norm(f"{path}.input_layernorm", hidden, bias=True)
    yield from _norm("transformer.ln_f", hidden, bias=True)
    yield "lm_head.weight", (s.vocabulary, hidden)


def bloom(s: Settings) -> Shapes:
    hidden = s.size("n_embed", "hidden_size")
    yield "transformer.word_embeddings.weight", (s.vocabulary, hidden)
    yield from _norm("transformer.word_embeddings_layernorm", hidden, bias=True)
    for i in range(s.blocks):
        path = f"transformer.h.{i}"
        yield from _two_norms(path, hidden, bias=True)
        yield from _linear(f"{path}.self_attention.query_key_value", 3 * hidden, hidden, bias=True)
        yield from _linear(f"{path}.self_attention.dense", hidden, hidden, bias=True)
        yield from _linear(f"{path}.mlp.dense_h_to_4h", 4 * hidden, hidden, bias=True)
        yield from _linear(f"{path}.mlp.dense_4h_to_h", hidden, 4 * hidden, bias=True)
    yield from _norm("transformer.ln_f", hidden, bias=True)
    yield "lm_head.weight", (s.vocabulary, hidden)


def gpt_neox(s: Settings) -> Shapes:
    hidden, inner = s.size("hidden_size"), s.size("intermediate_size", default=24576)
    bias = s.flag("attention_bias", default=True)
    yield "gpt_neox.embed_in.weight", (s.vocabulary, hidden)
    for i in range(s.blocks):
        path = f"gpt_neox.layers.{i}"
        yield from _two_norms(path, hidden, bias=True)
        yield from _linear(f"{path}.attention.query_key_value", 3 * hidden, hidden, bias)
        yield from _linear(f"{path}.attention.dense", hidden, hidden, bias)
        yield from _linear(f"{path}.mlp.dense_h_to_4h", inner, hidden, bias=True)
        yield from _linear(f"{path}.mlp.dense_4h_to_h", hidden, inner, bias=True)
    yield from _norm("gpt_neox.final_layer_norm", hidden, bias=True)
    yield "lm_head.weight", (s.vocabulary, hidden)


def gpt2(s: Settings) -> Shapes:
    hidden = s.size("n_embd", "hidden_size")
    positions = s.size("n_positions", "max_position_embeddings", default=1024)
    inner = s.size("n_inner", default=4 * hidden)
    yield "transformer.wte.weight", (s.vocabulary, hidden)
    yield "transformer.wpe.weight", (positions, hidden)
    for i in range(s.blocks):
        path = f"transformer.h.{i}"
        yield from _norm(f"{path}.ln_1", hidden, bias=True)
        yield from _conv1d(f"{path}.attn.c_attn", 3 * hidden, hidden)
        yield from _conv1d(f"{path}.attn.c_proj", hidden, hidden)
        yield from _norm(f"{path}.ln_2", hidden, bias=True)
        yield from _conv1d(f"{path}.mlp.c_fc", inner, hidden)
        yield from _conv1d(f"{path}.mlp.c_proj", hidden, inner)
    yield from _norm("transformer.ln_f", hidden, bias=True)
    yield "lm_head.weight", (s.vocabulary, hidden)


def bounded(shapes: Shapes) -> dict[str, Shape]:
    """All of them by name; raises `ModelError` past 500,000, which no model comes near."""
    found: dict[str, Shape] = {}
    for name, shape in shapes:
        if len(found) == MAX_PARAMETERS:
            raise _bad(
                "num_hidden_layers",
                f"it describes a model of more than {MAX_PARAMETERS} parameters; check blocks, "
                "heads and experts",
            )
        found[name] = shape
    return found
