"""Export `exl2`: a reader written from the layout's description gives the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitmill.config.quantization import parse_config
from bitmill.errors import FormatError, SpecError
from bitmill.formats.exl2.format import Exl2
from bitmill.formats.export_plan import ExportTarget
from bitmill.formats.older_settings import FULL, SLIDING
from bitmill.pipeline.admission import admit, check_exports
from bitmill.pipeline.export import Export
from exl2_models import CYCLE, SIZES, packed_model, weight_of
from tiny import save_tiny
from tiny_architectures import tiny_config
from weights import pack_model


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_a_reader_gives_the_packed_weights_in_fp16(tmp_path: Path, order: str) -> None:
    packed = packed_model(tmp_path, order)
    export = Export.of(packed.folder, Exl2())
    said = export.report()
    assert export.write(tmp_path / "out", lambda *_: None) == said
    assert said.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in packed.weights.items():
        assert torch.equal(weight_of(stored, name), weight.dequantize().half()), name
    kept = {name: t for name, t in stored.items() if ".q_" not in name}
    assert {t.dtype for t in kept.values()} == {torch.float16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "exl2"
    assert 2 < config["quantization_config"]["bits"] < 8
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_gemma_3_lies_where_the_loader_looks_for_its_text_model(tmp_path: Path) -> None:
    packed = packed_model(tmp_path, kind="gemma3_text")
    Export.of(packed.folder, Exl2()).write(tmp_path / "out", lambda *_: None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in packed.weights.items():
        assert torch.equal(weight_of(stored, f"language_model.{name}"), weight.dequantize().half())
    before = load_file(packed.folder / "model.safetensors")
    kept = {name: t for name, t in stored.items() if ".q_" not in name or "q_norm" in name}
    for name, tensor in kept.items():
        assert torch.equal(tensor, before[name.removeprefix("language_model.")].half()), name
    assert "language_model.model.embed_tokens.weight" in kept
    assert "language_model.model.layers.5.post_feedforward_layernorm.weight" in kept
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert config["rope_theta"] == config["rope_parameters"]["full_attention"]["rope_theta"]
    assert config["sliding_window_pattern"] == 6


def test_rotary_settings_go_by_the_names_that_the_loader_reads(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    packed = packed_model(tmp_path, rope_parameters=scaled)
    Export.of(packed.folder, Exl2()).write(tmp_path / "out", lambda *_: None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5e4
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
ROPES = {kind: {"rope_type": "default", "rope_theta": 1e6} for kind in (FULL, SLIDING)}


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("gemma2", {}, "gemma2: models of this type are not written, only gemma3_text, llama"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not what ExLlamaV2 computes"),
        ("llama", {"rope_parameters": YARN}, "rope_type 'yarn' is not computed the same"),
        ("llama", {"mlp_bias": True}, "mlp_bias: it moves rows of up and gate, and leaves"),
        ("mistral", {"sliding_window": 8}, "sliding_window 8 is not applied to this type"),
        (
            "gemma3_text",
            {"rope_parameters": ROPES},
            "rope_theta 1000000.0 (default) is not read: it takes 10000",
        ),
        ("gemma3_text", {"layer_types": [FULL] * 6}, "layer_types have no window"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is"),
    ],
)
def test_what_the_loader_would_not_compute_is_refused_by_name(
    tmp_path: Path, kind: str, changes: dict[str, Any], problem: str
) -> None:
    packed = packed_model(tmp_path, kind=kind, **changes)
    with pytest.raises(SpecError, match=re.escape(problem)):
        Export.of(packed.folder, Exl2())


def test_codes_on_other_grids_are_refused_by_the_linears_name(tmp_path: Path) -> None:
    config = tiny_config("llama")
    for name, value in (SIZES | {"num_attention_heads": 5}).items():
        setattr(config, name, value)
    packed = pack_model(save_tiny(tmp_path / "source", config), tmp_path / "packed", cycle=CYCLE)
    with pytest.raises(FormatError, match=r"model\.layers\.0\..* cannot be held by format"):
        Export.of(packed.folder, Exl2()).write(tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (
            {},
            "refinement.method: its grid holds only what was solved on it",
        ),
        ({"refinement": {"method": "exllama"}, "widths": [1, 2]}, "it has no widths [1]"),
        ({"refinement": {"method": "exllama"}}, None),
    ],
)
def test_jobs_are_refused_at_submission(
    tmp_path: Path, spec: dict[str, Any], problem: str | None
) -> None:
    config = tiny_config("llama")
    for name, value in (SIZES | {"num_attention_heads": 5}).items():
        setattr(config, name, value)
    source = save_tiny(tmp_path / "source", config)
    allocation = {"widths": spec.get("widths", [2, 3, 4])}
    job = {"budget": {"code_bits": 3}, "allocation": allocation}
    asked = parse_config(job | {key: spec[key] for key in spec if key != "widths"})
    admitted, target = admit(source, asked), ExportTarget(format="exl2")
    if problem is None:
        check_exports(admitted, [target])
        return
    with pytest.raises(SpecError, match=re.escape(problem)):
        check_exports(admitted, [target])


def test_sides_must_be_multiples_of_32(tmp_path: Path) -> None:
    packed = packed_model(tmp_path, intermediate_size=80)
    with pytest.raises(SpecError, match="its sides 80 and 160 must be multiples of 32"):
        Export.of(packed.folder, Exl2())
