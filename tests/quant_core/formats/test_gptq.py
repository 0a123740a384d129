"""Export `gptq`: a reader written from the layout's description gives the packed weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bitmill.errors import SpecError
from bitmill.formats.gptq.format import GPTQCheckpoint
from bitmill.pipeline.export import Export
from tiny import save_tiny, tiny_llama
from tiny_architectures import tiny_config
from weights import PackedModel, pack_model


def exported(packed: Path, out: Path, **settings: Any) -> Path:
    Export.of(packed, GPTQCheckpoint(**settings)).write(out, lambda *_: None)
    return out


def settings_of(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Bits and group size of a module, None where it is not quantized; rules in the file's order,
    the first that matches wins (vLLM)."""
    for rule, changes in config["dynamic"].items():
        if re.match(rule[2:], name):
            return None if rule.startswith("-:") else config | changes
    return config


def unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Values [count, C] of streams that run down the columns of i32 [W, C]."""
    found = np.empty((count, words.shape[1]), np.int64)
    for column, stream in enumerate(words.astype(np.uint32).T):
        number = int.from_bytes(stream.astype("<u4").tobytes(), "little")
        found[:, column] = [number >> bits * i & (1 << bits) - 1 for i in range(count)]
    return found


def weight_of(folder: Path, name: str) -> torch.Tensor:
    """f32 [N, K]."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored, own = load_file(folder / "model.safetensors"), settings_of(config, name)
    assert own is not None
    scales, groups = stored[f"{name}.scales"].astype(np.float32), stored[f"{name}.g_idx"]
    codes = unpacked(stored[f"{name}.qweight"], own["bits"], len(groups))
    zeros = unpacked(stored[f"{name}.qzeros"].T, own["bits"], scales.shape[1]).T
    if config["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    assert (groups == np.arange(len(groups)) // own["group_size"]).all()
    return torch.from_numpy((scales[groups] * (codes - zeros[groups])).T.astype(np.float32))


def packed_model(folder: Path, cycle: tuple[int, ...], **changes: Any) -> PackedModel:
    sizes = {"hidden_size": 160, "head_dim": 32, "num_attention_heads": 5, "num_key_value_heads": 1}
    source = tiny_llama(folder / "source", **(sizes | changes))
    return pack_model(source, folder / "packed", cycle=cycle)


@pytest.mark.parametrize(
    ("cycle", "settings"),
    [
        ((3, 4, 2, 6, 8, 5), {}),
        ((3, 2, 3), {"fused": False}),
        ((0, 3, 0, 0), {}),
        ((1, 3), {}),
        ((2, 3, 1), {"symmetric": True}),
        ((2, 6, 5), {"symmetric": True, "version": 1}),
    ],
)
def test_a_reader_gives_the_packed_weights(
    tmp_path: Path, cycle: tuple[int, ...], settings: dict[str, Any]
) -> None:
    packed = packed_model(tmp_path, cycle)
    export = Export.of(packed.folder, GPTQCheckpoint(**settings))
    said = export.report()
    assert export.write(tmp_path / "out", lambda *_: None) == said
    assert said.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    for name, weight in packed.weights.items():
        assert torch.equal(weight_of(tmp_path / "out", name), weight.dequantize()), name


@pytest.mark.parametrize(
    ("cycle", "version", "word"),
    [
        ((3,), 1, 0x77777777),
        ((3,), 2, 0x88888888),
        ((2,), 1, 0xDB6DB6DB),
        ((2,), 2, 0x24924924),
    ],
)
def test_symmetric_zero_points_are_the_words_that_gptqmodel_writes(
    tmp_path: Path, cycle: tuple[int, ...], version: int, word: int
) -> None:
    packed = packed_model(tmp_path, cycle)
    out = exported(packed.folder, tmp_path / "out", version=version, symmetric=True)
    zeros = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.qzeros"]
    assert zeros.astype(np.uint32)[0, 0] == word


def test_rules_name_what_is_kept_first_and_then_what_differs(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", tiny_config("mixtral"))
    packed = pack_model(source, tmp_path / "packed", cycle=(4, 4, 3))
    out = exported(packed.folder, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    signs = [rule[0] for rule in config["dynamic"]]
    assert signs == sorted(signs, reverse=True)
    assert "-" in signs
    assert settings_of(config, "model.layers.0.block_sparse_moe.gate") is None
    assert config["group_size"] == 64
    assert any(rule.endswith(r"\.w2$") for rule in config["dynamic"])
    for name, weight in packed.weights.items():
        stored = name.replace(".mlp.", ".block_sparse_moe.") if ".experts." in name else name
        for part, letter in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            stored = (
                stored.replace(f".{part}_proj", f".{letter}") if ".experts." in name else stored
            )
        assert torch.equal(weight_of(out, stored), weight.dequantize()), name


@pytest.mark.parametrize(
    ("cycle", "settings", "problem"),
    [
        ((4,), {"version": 1}, "symmetric: version 1 cannot hold a zero point of 0"),
        ((8,), {"symmetric": True}, "groups of [8] bits fit none of its widths [2, 3, 4, 8]"),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(
    tmp_path: Path, cycle: tuple[int, ...], settings: dict[str, Any], problem: str
) -> None:
    packed = packed_model(tmp_path, cycle)
    with pytest.raises(SpecError, match=re.escape(problem)):
        exported(packed.folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_sides_that_are_no_multiples_of_32_are_refused_by_name(tmp_path: Path) -> None:
    packed = packed_model(tmp_path, (4,), intermediate_size=200)
    with pytest.raises(SpecError, match=r"gate_proj: its sides 200 and 160 must be multiples"):
        exported(packed.folder, tmp_path / "out")
