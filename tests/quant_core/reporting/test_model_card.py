"""The card of a pushed folder: what is told of it, and commands of runtimes that read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitmill.reporting.model_card import CardFacts, model_card
from bitmill.results import LinearResult, QualityReport
from tiny import tiny_llama
from weights import pack_model

ALL = ("import bitmill", "AutoModel", "vllm serve", "llama-cli -hf", "mlx_lm", "test_inference.py")


def affine(*, symmetric: bool) -> dict[str, Any]:
    """What compressed-tensors says of its linears."""
    group = {"weights": {"num_bits": 4, "symmetric": symmetric}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def gptq(**changes: Any) -> dict[str, Any]:
    """What GPTQModel says of its linears, of which one is kept."""
    return {"quant_method": "gptq", "bits": 4, "sym": True, "dynamic": {"-:b": {}}} | changes


@pytest.mark.parametrize(
    ("config", "tag", "told"),
    [
        ({}, "safetensors", ("AutoModel", "vllm serve")),
        ({"quantization_config": {"quant_method": "plain-bytes"}}, "plain-bytes", ()),
        ({"quantization_config": affine(symmetric=True)}, "compressed-tensors", ALL[1:3]),
        ({"quantization_config": affine(symmetric=False)}, "compressed-tensors", ALL[2:3]),
        ({"quantization_config": gptq()}, "gptq", ALL[1:3]),
        ({"quantization_config": gptq(sym=False)}, "gptq", ALL[1:2]),
        ({"quantization_config": gptq(dynamic={"+:a": {"bits": 2}})}, "gptq", ALL[1:2]),
        ({"quantization_config": {"quant_method": "exl2"}}, "exl2", ("test_inference.py",)),
        ({"quantization": {"mode": "affine", "bits": 4}}, "mlx", ("mlx_lm",)),
        (None, "gguf", ("AutoModel", "llama-cli -hf")),
    ],
)
def test_an_export_is_loaded_by_what_reads_it(
    config: dict[str, Any] | None, tag: str, told: tuple[str, ...], tmp_path: Path
) -> None:
    name, content = ("model.gguf", "") if config is None else ("config.json", json.dumps(config))
    (tmp_path / name).write_text(content)
    card = model_card(tmp_path, "org/model", CardFacts())["README.md"].decode()
    assert tuple(one for one in ALL if one in card) == told
    assert f'"{tag}"' in card.partition("tags:")[2].partition("\n")[0]
    library = tag if tag in ("gguf", "mlx") else "transformers"
    assert f'library_name: "{library}"\n' in card


@pytest.mark.parametrize(("order", "target"), [("natural", "gguf"), ("activation", "dequantized")])
def test_a_packed_folder_is_exported_to_what_holds_it(
    order: Any, target: str, tmp_path: Path
) -> None:
    source = tiny_llama(tmp_path / "source")
    packed = pack_model(source, tmp_path / "packed", cycle=(3, 4), order=order)
    card = model_card(packed.folder, "org/model", CardFacts())["README.md"].decode()
    assert f"bitmill export packed --format {target} " in card
    assert ("llama-cli" in card) == (target == "gguf")


@pytest.mark.parametrize(
    ("version", "linears", "served"),
    [
        (1, ("mlp.gate_proj", "mlp.up_proj"), True),
        (2, ("mlp.gate_proj", "mlp.up_proj"), True),
        (3, ("mlp.gate_proj", "mlp.up_proj"), False),
        (1, ("mlp.up_proj",), False),
        (2, ("self_attn.o_proj", "self_attn.q_proj", "self_attn.k_proj"), False),
        (1, ("mlp.experts.1.w1",), False),
    ],
)
def test_what_the_plug_ins_of_engines_refuse_is_not_served_by_them(
    version: int, linears: tuple[str, ...], served: bool, tmp_path: Path
) -> None:
    packed = {f"model.layers.0.{name}": {} for name in linears}
    own = {"quant_method": "bitmill", "format_version": version, "linears": packed}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": own}))
    card = model_card(tmp_path, "org/model", CardFacts())["README.md"].decode()
    assert "import bitmill.hf" in card
    assert ("vllm serve" in card) == ("sglang.launch_server" in card) == served


def test_a_report_alone_tells_how_many_tokens_were_calibrated_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    linears = tuple(
        LinearResult(name=name, code_bits=3, relative_error=0.1, tokens=tokens)
        for name, tokens in (("expert", 17), ("gate", 4096))
    )
    report = QualityReport(rows=(), linears=linears)
    card = model_card(tmp_path, "org/model", CardFacts(report=report))["README.md"].decode()
    assert "## Calibration\n4,096 tokens.\n" in card
    assert "Calibration" not in model_card(tmp_path, "o/m", CardFacts())["README.md"].decode()
