"""`load` gives a complete model or an error that names what is wrong; never random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitmill
from bitmill.errors import FormatError
from bitmill.inference.load import refuse_incomplete
from tiny import tiny_llama
from weights import PackedModel, dequantized_model, pack_model

VALUE = "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("loading")
    return pack_model(tiny_llama(folder / "source"), folder / "packed", order="activation")


def damaged(packed: PackedModel, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(packed.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_load_gives_a_model_ready_to_run(
    packed: PackedModel, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITMILL_BACKEND", "reference")  # equal bit for bit, not only close
    model = bitmill.load(packed.folder, dtype=dtype)
    compute = torch.float32 if dtype == "auto" else dtype
    tokens = torch.arange(2, 30)[None]
    assert not model.training
    assert model.dtype == compute
    with torch.inference_mode():
        expected = dequantized_model(packed, compute)(tokens).logits
        assert torch.equal(model(tokens).logits, expected)


def test_a_device_map_loads_the_same_model(packed: PackedModel) -> None:
    pytest.importorskip("accelerate")
    tokens = torch.arange(2, 30)[None]
    with torch.inference_mode():
        expected = bitmill.load(packed.folder)(tokens).logits
        mapped = bitmill.load(packed.folder, device_map={"": "cpu"})(tokens).logits
    assert torch.equal(mapped, expected)


def test_the_tokenizer_comes_from_the_folder(packed: PackedModel) -> None:
    tokenizer = bitmill.load_tokenizer(str(packed.folder))
    assert tokenizer.decode(tokenizer("grain")["input_ids"]) == "grain"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t.pop(f"{VALUE}.scales"), f"{VALUE}.scales"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.update({f"{VALUE}.weight": torch.zeros(80, 160)}), f"{VALUE}.weight"),
        (lambda t: t.update({"model.stranger": torch.zeros(1)}), "model.stranger"),
        (lambda t: t[f"{VALUE}.scales"].fill_(-1), f"{VALUE}.scales"),
        (lambda t: t["model.layers.0.mlp.gate_proj.order"].zero_(), "mlp.gate_proj.order"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), "model.norm.weight"),
    ],
    ids=["scales", "norm", "weight", "stranger", "negative", "order", "shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    packed: PackedModel, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], name: str
) -> None:
    folder = damaged(packed, tmp_path / "damaged", change)
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        bitmill.load(folder)


def test_an_unknown_format_version_is_refused(packed: PackedModel, tmp_path: Path) -> None:
    folder = shutil.copytree(packed.folder, tmp_path / "newer")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="format_version 3 is unknown") as refusal:
        bitmill.load(folder)
    assert refusal.value.code == "unknown_format_version"


def test_a_plain_model_is_refused(packed: PackedModel) -> None:
    with pytest.raises(FormatError, match="not a packed model"):
        bitmill.load(packed.source)


@pytest.mark.parametrize("problem", ["missing_keys", "unexpected_keys", "mismatched_keys"])
def test_every_entry_of_the_loading_report_is_an_error(problem: str) -> None:
    with pytest.raises(FormatError, match=rf"1 {problem.replace('_', ' ')}, first a\.b"):
        refuse_incomplete({problem: {"a.b"}})
    refuse_incomplete({"missing_keys": set(), "unexpected_keys": set()})
