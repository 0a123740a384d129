"""Packed folders in transformers: exact outputs, generation, and a byte-equal save."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    MixtralConfig,
    Qwen3MoeConfig,
)

import bitmill
import bitmill.hf
from bitmill.errors import FormatError
from bitmill.inference.hf_quantizer import BitmillConfig, quantized_linears
from tiny import VOCABULARY, llama_config, save_tiny, tiny_llama, tiny_opt
from weights import PackedModel, dequantized_model, pack_model

TOKENS = torch.arange(2, 26)[None]
OUTSIDE = """
import sys
from transformers import AutoModelForCausalLM
if sys.argv[2] == "import":
    import bitmill.hf
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(type(m).__name__ == "QuantizedLinear" for m in model.modules()))
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("llama")
    return pack_model(tiny_llama(folder / "source"), folder / "packed", order="activation")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("opt")
    return pack_model(tiny_opt(folder / "source"), folder / "packed")


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """Some groups have width 0, and so have all groups of some linears."""
    folder = tmp_path_factory.mktemp("dropped")
    source, cycle = tiny_llama(folder / "source"), (3, 0, 2, 0, 0)
    made = pack_model(source, folder / "packed", order="activation", cycle=cycle)
    assert any(set(widths) == {0} for widths in made.map.linears.values())
    return made


@pytest.fixture(params=["llama", "opt", "dropped"])
def packed(request: pytest.FixtureRequest) -> PackedModel:
    result: PackedModel = request.getfixturevalue(request.param)
    return result


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality bit for bit is the reference backend's promise; the kernels sum in other orders."""
    monkeypatch.setenv("BITMILL_BACKEND", "reference")


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(TOKENS).logits
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_those_of_the_dequantized_model(
    packed: PackedModel, dtype: torch.dtype
) -> None:
    model = loaded(packed.folder, dtype=dtype)
    assert quantized_linears(model).keys() == packed.weights.keys()
    assert torch.equal(logits(model), logits(dequantized_model(packed, dtype)))


def test_scales_stay_fp16_in_every_compute_dtype(llama: PackedModel) -> None:
    for module in quantized_linears(loaded(llama.folder, dtype=torch.bfloat16)).values():
        assert module.scales.dtype == torch.float16


def test_siblings_share_the_order_that_the_first_one_stores(llama: PackedModel) -> None:
    attention = loaded(llama.folder).model.layers[1].self_attn
    assert torch.equal(attention.k_proj.order, attention.q_proj.order)
    assert "order" in attention.q_proj.state_dict()
    assert "order" not in attention.v_proj.state_dict()


def test_saving_keeps_the_packed_tensors_byte_for_byte(packed: PackedModel, tmp_path: Path) -> None:
    loaded(packed.folder).save_pretrained(tmp_path)
    before = load_file(packed.folder / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    configs = [json.loads((f / "config.json").read_text()) for f in (packed.folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(loaded(tmp_path)), logits(loaded(packed.folder)))


def test_the_tied_head_is_the_embedding(llama: PackedModel) -> None:
    model = loaded(llama.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", llama_config(tie_word_embeddings=False))
    packed = pack_model(source, tmp_path / "packed")
    assert "lm_head.weight" in load_file(packed.folder / "model.safetensors")
    assert torch.equal(logits(loaded(packed.folder)), logits(dequantized_model(packed)))


def test_generation_is_that_of_the_dequantized_model(packed: PackedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed.folder)
    prompt = tokenizer("One, two", return_tensors="pt").input_ids
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    answers = [
        model.generate(prompt, **options)
        for model in (loaded(packed.folder), dequantized_model(packed))
    ]
    assert answers[0].shape[1] == prompt.shape[1] + 12
    assert torch.equal(*answers)


def test_the_base_model_loads_without_its_head(llama: PackedModel) -> None:
    base = AutoModel.from_pretrained(llama.folder).eval()
    with torch.inference_mode():
        hidden = base(TOKENS).last_hidden_state
        expected = dequantized_model(llama).model(TOKENS).last_hidden_state
    assert torch.equal(hidden, expected)


def test_dequantize_gives_plain_linears(llama: PackedModel) -> None:
    model = loaded(llama.folder)
    expected = logits(model)
    plain = model.dequantize()
    assert not quantized_linears(plain)
    assert torch.equal(logits(plain), expected)


def test_transposed_linears_are_loaded(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=160,
        n_layer=1,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    source = save_tiny(tmp_path / "source", config)
    packed = pack_model(source, tmp_path / "packed")
    assert torch.equal(logits(loaded(packed.folder)), logits(dequantized_model(packed)))


MOE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 136,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**MOE, moe_intermediate_size=48, num_experts=3),
        MixtralConfig(**MOE, num_local_experts=3),
    ],
    ids=["qwen3_moe", "mixtral"],
)
def test_experts_are_packed_one_by_one(config: Any, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", config)
    packed = pack_model(source, tmp_path / "packed", order="activation")
    assert len([name for name in packed.weights if ".mlp.experts." in name]) == 9
    stored = load_file(source / "model.safetensors")
    for linear in packed.plan.linears:
        stored[linear.source.tensor] = packed.weights[linear.name].dequantize()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    expected = logits(loaded(source))
    model = loaded(packed.folder)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(packed.folder / "model.safetensors").items():
        assert "gate.weight" in name or torch.equal(again[name], tensor), name
    assert torch.equal(logits(bitmill.load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("how", ["import", "forget"])
def test_a_fresh_process_needs_only_the_import(llama: PackedModel, how: str) -> None:
    command = [sys.executable, "-c", OUTSIDE, str(llama.folder), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    assert done.stdout.strip() == ("14" if how == "import" else "0")
    assert ("Unknown quantization type" in done.stderr) == (how == "forget")


def test_a_linear_that_the_model_lacks_is_refused_by_name(
    llama: PackedModel, opt: PackedModel
) -> None:
    config = json.loads((opt.folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(FormatError, match=r"model\.decoder\.layers\.0\..* is not in the model"):
        loaded(llama.folder, config=_config_with(llama.folder, config))


def _config_with(folder: Path, quantization: dict[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = quantization
    return config


def test_the_config_refuses_unknown_versions_and_keeps_its_keys() -> None:
    stored = {
        "quant_method": "bitmill",
        "format_version": 1,
        "group_size": 128,
        "linears": {"a": {"widths": "3", "order": None}},
    }
    assert BitmillConfig.from_dict(stored).to_dict() == stored
    with pytest.raises(FormatError, match="format_version 9 is unknown"):
        BitmillConfig.from_dict(stored | {"format_version": 9})
    assert bitmill.hf.QUANT_METHOD == "bitmill"
