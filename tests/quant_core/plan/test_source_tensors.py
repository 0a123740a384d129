"""Which stored tensor is which parameter: wrappers, strays, and what is missing or misshapen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bitmill.errors import ModelError
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.architectures import ARCHITECTURES
from bitmill.plan.source_tensors import SourceTensors, place_tensors

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 258,
    "tie_word_embeddings": True,
}
MOE = LLAMA | {"num_experts": 3, "moe_intermediate_size": 32, "head_dim": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3_moe": MOE,
    "mixtral": LLAMA | {"num_local_experts": 3},
    "gpt2": LLAMA | {"n_inner": 96},
    "falcon": LLAMA,
    "bloom": LLAMA,
    "gpt_neox": LLAMA | {"tie_word_embeddings": False},
    "opt": LLAMA,
}


def stored(model_type: str = "llama") -> dict[str, TensorInfo]:
    """A complete checkpoint of the architecture, each parameter under its own name."""
    shapes = ARCHITECTURES[model_type].parameters(CONFIGS[model_type]).shapes
    return {name: TensorInfo(name, "F32", shape, "m") for name, shape in shapes.items()}


def added(tensors: dict[str, TensorInfo], name: str, shape: tuple[int, ...], dtype: str) -> None:
    tensors[name] = TensorInfo(name, dtype, shape, "m")


def renamed(tensors: dict[str, TensorInfo], change: Callable[[str], str]) -> dict[str, TensorInfo]:
    return {
        change(name): TensorInfo(change(name), tensor.dtype, tensor.shape, tensor.file)
        for name, tensor in tensors.items()
    }


def place(tensors: dict[str, TensorInfo], model_type: str = "llama") -> SourceTensors:
    found = ARCHITECTURES[model_type]
    return place_tensors(tensors.values(), found, found.parameters(CONFIGS[model_type]))


def refused(tensors: dict[str, TensorInfo], model_type: str = "llama") -> ModelError:
    with pytest.raises(ModelError) as caught:
        place(tensors, model_type)
    assert "\n" not in caught.value.message
    return caught.value


WRAPPED: list[Callable[[str], str]] = [
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module.{name}",
    lambda name: f"base_model.model.{name}",
    lambda name: f"_forward_module.module._orig_mod.{name}",
    lambda name: f"module.base_model.model.{name}",
    lambda name: name.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module."),
    lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    lambda name: name.replace("model.", "model.language_model.", 1),
    lambda name: f"language_model.{name}",
    lambda name: name.replace("model.", "model.language_model.model.", 1),
    lambda name: name.replace("model.", "language_model.model.model.", 1),
    lambda name: name.replace("model.", "model.text_model.", 1),
    lambda name: f"_orig_mod.{name.replace('model.', 'model.language_model.', 1)}",
    lambda name: name.removeprefix("model."),
    lambda name: f"_orig_mod.{name.removeprefix('model.')}",
]


@pytest.mark.parametrize("change", WRAPPED)
def test_wrappers_are_stripped_from_names(change: Callable[[str], str]) -> None:
    plain = stored()
    wrapped = renamed(plain, change)
    found = place(wrapped)
    assert found.left_out == ()
    assert {module: tensor.stored.name for module, tensor in found.placed.items()} == {
        name: change(name) for name in plain
    }
    assert {module: tensor.name for module, tensor in found.placed.items()} == {
        name: name for name in plain
    }


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_wrappers_are_stripped_for_every_base_model(model_type: str, prefix: str) -> None:
    plain = stored(model_type)
    assert place(plain, model_type).placed.keys() == plain.keys()
    found = place(renamed(plain, lambda name: prefix + name), model_type)
    assert {tensor.name for tensor in found.placed.values()} == set(plain)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("student.", "begin with 'student.'"),
        ("ema_model.module.", "begin with 'ema_model.module.'"),
        ("model.model.", "begin with 'model.model.'"),
        ("_orig_mod.policy.", "begin with '_orig_mod.policy.'"),
        ("transformer.", "begin with 'transformer.'"),
    ],
)
def test_unknown_wrappers_are_refused_with_the_prefix_and_what_was_expected(
    prefix: str, said: str
) -> None:
    error = refused(renamed(stored(), lambda name: prefix + name))
    assert said in error.message
    assert "a llama model has model.embed_tokens.weight" in error.message
    assert error.code == "missing_tensor"


def test_two_spellings_of_one_parameter_are_refused() -> None:
    tensors = stored()
    added(tensors, "_orig_mod.model.norm.weight", (64,), "F32")
    error = refused(tensors)
    assert error.code == "duplicate_tensor"
    assert "model.norm.weight" in error.message
    assert error.param == "_orig_mod.model.norm.weight"


LEFT_OUT = [
    ("v_head.summary.weight", (1, 64), "F32", "heads of other tasks"),
    ("v_head.summary.bias", (1,), "F32", "heads of other tasks"),
    ("score.weight", (2, 64), "BF16", "heads of other tasks"),
    ("model.score.weight", (2, 64), "BF16", "heads of other tasks"),
    ("value_head.0.weight", (64, 64), "F16", "heads of other tasks"),
    ("classifier.out_proj.weight", (3, 64), "F32", "heads of other tasks"),
    ("reward_model_head.weight", (), "F64", "heads of other tasks"),
    ("_orig_mod.qa_outputs.weight", (2, 64), "F32", "heads of other tasks"),
    ("mtp.layers.0.mlp.up_proj.weight", (96, 64), "F32", "heads that predict several tokens"),
    ("model.mtp.norm.weight", (64,), "F32", "heads that predict several tokens"),
    ("medusa_head.0.linear.weight", (64, 64), "F32", "heads that predict several tokens"),
    ("model.layers.2.eh_proj.weight", (64, 128), "F32", "heads that predict several tokens"),
    ("model.rotary_emb.inv_freq", (8,), "F32", "buffers that the model computes itself"),
    ("model.layers.1.self_attn.rotary_emb.inv_freq", (8,), "F32", "buffers that the model"),
    ("model.layers.1.self_attn.masked_bias", (), "F32", "buffers that the model"),
    ("model.position_ids", (1, 512), "I64", "buffers that the model computes itself"),
    ("model.causal_mask", (1, 1, 9, 9), "BOOL", "buffers that the model computes itself"),
    ("model.layers.0.self_attn.k_scale", (1,), "F32", "scales of a quantized key-value cache"),
    ("model.layers.0.self_attn.k_proj.k_scale", (), "BF16", "scales of a quantized"),
    ("model.layers.0.self_attn.attn.v_scale", (2, 1), "F32", "scales of a quantized"),
    ("model.layers.0.self_attn.kv_cache_scaling_factor", (1,), "F32", "scales of a quantized"),
    ("model.visual.patch_embed.proj.weight", (8, 3, 2, 2, 2), "F32", "parts for images"),
    ("vision_tower.encoder.layers.0.weight", (8, 8), "F32", "parts for images"),
    ("multi_modal_projector.linear_1.bias", (8,), "F32", "parts for images"),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "what"), LEFT_OUT, ids=lambda v: str(v))
def test_what_a_language_model_does_not_need_is_left_out(
    name: str, shape: tuple[int, ...], dtype: str, what: str
) -> None:
    tensors = stored()
    added(tensors, name, shape, dtype)
    found = place(tensors)
    assert found.placed.keys() == stored().keys()
    ((tensor, said),) = found.left_out
    assert (tensor.name, said.startswith(what)) == (name, True)


def test_a_whole_predicting_block_past_the_last_is_left_out() -> None:
    tensors = stored()
    for name, tensor in list(tensors.items()):
        if ".layers.1." in name:
            added(tensors, name.replace(".1.", ".2."), tensor.shape, "F32")
    error = refused(dict(tensors))
    assert "says 2 decoder blocks, the source stores model.layers.2." in error.message
    added(tensors, "model.layers.2.enorm.weight", (64,), "F32")
    assert len(place(tensors).left_out) == 10


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt2", "h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("falcon", "transformer.h.0.self_attention.rotary_emb.inv_freq"),
        ("opt", "decoder.version"),
    ],
)
def test_buffers_of_older_formats_are_left_out(model_type: str, name: str) -> None:
    tensors = stored(model_type)
    added(tensors, name, (1, 1, 8, 8), "U8")
    assert [tensor.name for tensor, _ in place(tensors, model_type).left_out] == [name]


REFUSED = [
    ("model.layers.0.self_attn.q_proj.bias", (64,), "unexpected_tensor", "q_proj has no bias"),
    ("model.layers.1.mlp.up_proj.bias", (96,), "unexpected_tensor", "up_proj has no bias"),
    ("model.layers.1.input_layernorm.bias", (64,), "unexpected_tensor", "has no bias"),
    ("model.norm.bias", (64,), "unexpected_tensor", "model.norm has no bias"),
    ("lm_head.bias", (258,), "unexpected_tensor", "lm_head has no bias"),
    ("model.layers.0.self_attn.q_norm.weight", (16,), "unexpected_tensor", "no place for it"),
    ("model.layers.0.self_attn.sinks", (4,), "unexpected_tensor", "no place for it"),
    ("model.layers.0.mlp.gate.weight", (4, 64), "unexpected_tensor", "no place for it"),
    ("model.embed_positions.weight", (512, 64), "unexpected_tensor", "no place for it"),
    ("something.weight", (1,), "unexpected_tensor", "no place for it"),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", (4, 64), "unmerged_adapter", "merge it"),
    ("model.layers.0.mlp.up_proj.lora_B.default.weight", (96, 4), "unmerged_adapter", "merge it"),
    ("base_model.model.lm_head.lora_embedding_A", (4, 64), "unmerged_adapter", "merge it"),
    ("model.layers.0.self_attn.k_proj.ia3_l.default", (32, 1), "unmerged_adapter", "merge it"),
    ("model.layers.1.adapter_gate", (1,), "unmerged_adapter", "merge it"),
    ("model.layers.0.mlp.up_proj.weight_scale", (96,), "already_quantized", "quantized already"),
    ("model.layers.0.mlp.up_proj.qweight", (12, 96), "already_quantized", "quantized already"),
]


@pytest.mark.parametrize(("name", "shape", "code", "said"), REFUSED, ids=lambda v: str(v))
def test_what_changes_the_function_is_refused_by_name(
    name: str, shape: tuple[int, ...], code: str, said: str
) -> None:
    tensors = stored()
    added(tensors, name, shape, "F32")
    error = refused(tensors)
    assert (error.code, error.param) == (code, name)
    assert said in error.message


@pytest.mark.parametrize("name", sorted(stored()))
def test_every_missing_parameter_is_named(name: str) -> None:
    tensors = stored()
    del tensors[name]
    if name in ("model.embed_tokens.weight", "lm_head.weight"):  # one of a tied pair is enough
        assert place(tensors).left_out == ()
        return
    error = refused(tensors)
    assert (error.code, error.param) == ("missing_tensor", name)


def test_missing_blocks_are_counted() -> None:
    tensors = {name: tensor for name, tensor in stored().items() if ".layers.1." not in name}
    error = refused(tensors)
    assert error.code == "missing_blocks"
    assert "promises 2 decoder blocks; the checkpoint has model.layers (1)" in error.message


@pytest.mark.parametrize("name", sorted(stored()))
def test_every_misshapen_parameter_is_named(name: str) -> None:
    tensors = stored()
    shape = tensors[name].shape
    added(tensors, name, (shape[0] + 1, *shape[1:]), "F32")
    error = refused(tensors)
    assert (error.code, error.param) == ("bad_shape", name)
    assert str(shape) in error.message


@pytest.mark.parametrize("dtype", ["I8", "U8", "I64", "BOOL", "I32"])
def test_parameters_that_are_no_floats_are_refused(dtype: str) -> None:
    tensors = stored()
    added(tensors, "model.norm.weight", (64,), dtype)
    error = refused(tensors)
    assert (error.code, error.param) == ("unsupported_dtype", "model.norm.weight")


@pytest.mark.parametrize(("model_type", "inner"), [("qwen3_moe", 32), ("mixtral", 96)])
def test_stacked_experts_have_places_of_their_own(model_type: str, inner: int) -> None:
    plain = stored(model_type)
    stacked = {name: tensor for name, tensor in plain.items() if ".experts." not in name}
    for block in range(2):
        path = f"module.model.layers.{block}.mlp.experts"
        added(stacked, f"{path}.gate_up_proj", (3, 2 * inner, 64), "F32")
        added(stacked, f"{path}.down_proj", (3, 64, inner), "F32")
    found = place(stacked, model_type)
    assert found.placed.keys() == plain.keys()
    up = found.placed["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert (up.shape, up.index, up.rows) == ((inner, 64), 2, (inner, 2 * inner))
    added(stacked, "model.layers.1.mlp.experts.2.up_proj.weight", (inner, 64), "F32")
    assert refused(stacked, model_type).code == "duplicate_tensor"


def test_too_few_or_small_stacked_experts_are_refused() -> None:
    tensors = {name: t for name, t in stored("qwen3_moe").items() if ".experts." not in name}
    for block in range(2):
        path = f"model.layers.{block}.mlp.experts"
        added(tensors, f"{path}.gate_up_proj", (3, 64, 64), "F32")
        added(tensors, f"{path}.down_proj", (2 + block, 64, 32), "F32")
    assert refused(tensors, "qwen3_moe").param == "model.layers.0.mlp.experts.2.down_proj.weight"
    added(tensors, "model.layers.0.mlp.experts.down_proj", (3, 64, 31), "F32")
    assert refused(tensors, "qwen3_moe").code == "bad_shape"
