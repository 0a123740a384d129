"""config.json of strangers: code-loading keys are dropped, sizes bounded, remote code refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitmill.errors import ModelError
from bitmill.plan.config_json import (
    check_config,
    read_config,
    refuse_adapter,
    refuse_pickles,
    sanitize,
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}


def folder_with(tmp_path: Path, config: object) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    return tmp_path


def test_keys_that_load_code_are_dropped_at_any_depth() -> None:
    hostile = LLAMA | {
        "_attn_implementation_internal": "stranger/kernels",
        "_name_or_path": "stranger/model",
        "attn_implementation": "stranger/kernels",
        "experts_implementation": "stranger/kernels",
        "trust_remote_code": True,
        "auto_map": {"AutoModel": "stranger/code--modeling.Model"},
        "text_module": "os",
        "rope_parameters": {"rope_type": "default", "_hidden": 1, "auto_map": {}},
        "layer_types": [{"_x": 1, "kind": "full"}],
    }
    assert sanitize(hostile) == LLAMA | {
        "rope_parameters": {"rope_type": "default"},
        "layer_types": [{"kind": "full"}],
    }


def test_native_model_with_code_beside_it_is_read_without_the_code(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, LLAMA | {"auto_map": {"AutoModel": "modeling.Model"}})
    config, found = read_config(folder)
    assert found.model_type == "llama"
    assert "auto_map" not in config


def test_model_that_exists_only_as_code_is_refused_with_the_reason(tmp_path: Path) -> None:
    internlm = LLAMA | {
        "model_type": "internlm2",
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    }
    with pytest.raises(ModelError, match=r"internlm2.*modeling_internlm2.*never runs") as caught:
        read_config(folder_with(tmp_path, internlm))
    assert caught.value.code == "remote_code"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_absurd_sizes_are_refused_by_name(
    change: dict[str, Any], param: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=param) as caught:
        read_config(folder_with(tmp_path, LLAMA | change))
    assert caught.value.code == "bad_config"
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": "64"}, 'hidden_size is "64", accepted are 1 to'),
        ({"hidden_size": True}, "hidden_size is true, accepted are 1 to"),
        ({"dtype": "int8"}, 'dtype is "int8", accepted are'),
        ({"dtype": True}, "dtype is true, accepted are"),
        ({"mlp_only_layers": "0"}, 'mlp_only_layers is "0", accepted is a list'),
        ({"intermediate_size": "128"}, 'intermediate_size is "128", accepted are 1 to'),
    ],
)
def test_a_refused_value_is_shown_as_it_stands_in_the_file(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    experts = {"num_attention_heads": 2, "num_experts": 4, "moe_intermediate_size": 32}
    moe = LLAMA | experts | {"model_type": "qwen3_moe", "intermediate_size": 128}
    with pytest.raises(ModelError) as refused:
        config, made = read_config(folder_with(tmp_path, moe | change))
        made.parameters(config)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "names no model_type"),
        ('{"model_type": 5}', "names no model_type"),
        (" " * (1 << 20) + "{}", "the limit is"),
    ],
)
def test_unreadable_config_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=problem):
        read_config(folder_with(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('"rms_norm_eps": Infinity', "rms_norm_eps"),
        ('"final_loss": NaN', "final_loss"),
        ('"initializer_range": -Infinity', "initializer_range"),
        ('"rope_theta": 1e999', "rope_theta"),
        ('"rope_parameters": {"factor": -1e400}', r"rope_parameters\.factor"),
        ('"history": [1, {"losses": [2.5, NaN]}]', r"history\[1\]\.losses\[1\]"),
        ('"_private": NaN', "_private"),
        ('"auto_map": {"loss": NaN}', r"auto_map\.loss"),
    ],
)
def test_numbers_that_json_has_no_spelling_for_are_refused(
    text: str, path: str, tmp_path: Path
) -> None:
    config = json.dumps(LLAMA)[:-1] + f", {text}}}"
    with pytest.raises(ModelError, match=rf"config\.json: {path} is -?(inf|nan)") as caught:
        read_config(folder_with(tmp_path, config))
    assert caught.value.code == "bad_config"


def test_weights_under_a_name_of_their_own_are_refused(tmp_path: Path) -> None:
    named = LLAMA | {"transformers_weights": "other.safetensors"}
    with pytest.raises(ModelError, match=r"weights are in 'other\.safetensors': call the file"):
        read_config(folder_with(tmp_path, named))
    usual = LLAMA | {"transformers_weights": "model.safetensors"}
    config, _ = read_config(folder_with(tmp_path, usual))
    assert config == LLAMA


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    refuse_adapter(folder_with(tmp_path, LLAMA))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="merge it into that model") as caught:
        refuse_adapter(tmp_path)
    assert caught.value.code == "unmerged_adapter"


def test_quantized_model_is_refused(tmp_path: Path) -> None:
    quantized = LLAMA | {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(ModelError, match="already quantized") as caught:
        read_config(folder_with(tmp_path, quantized))
    assert caught.value.code == "already_quantized"


def test_folder_without_config_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json: give a Hugging Face model folder"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_only_checkpoint_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=rf"{name} is a pickle") as caught:
        refuse_pickles(tmp_path)
    assert caught.value.code == "pickle_refused"
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuse_pickles(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        refuse_pickles(tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["int8", "float999", "float8_e4m3fn", "auto", 16, ["float32"]])
def test_a_precision_that_no_model_loads_in_is_refused(key: str, value: object) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8}
    for good in ("float32", "torch.bfloat16", "float16", None):
        check_config(config | {key: good})
    with pytest.raises(ModelError, match=f"{key} is") as refused:
        check_config(config | {key: value})
    assert (refused.value.code, refused.value.param) == ("bad_config", key)
