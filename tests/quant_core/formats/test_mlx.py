"""Export `mlx`: a reader written from the layout's description gives the packed weights.

`benchmarks/exports.py` runs mlx-lm itself."""

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
from bitmill.formats.mlx.format import Mlx
from bitmill.pipeline.export import Export
from tiny import save_tiny
from tiny_architectures import tiny_config
from weights import PackedModel, pack_model


def packed_model(folder: Path, kind: str, cycle: tuple[int, ...], **changes: Any) -> PackedModel:
    config = tiny_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    return pack_model(save_tiny(folder / "source", config), folder / "packed", cycle=cycle)


def exported(packed: PackedModel, out: Path, **settings: Any) -> dict[str, Any]:
    """Written, and its config.json."""
    export = Export.of(packed.folder, Mlx(**settings))
    assert export.write(out, lambda *_: None) == export.report()
    assert export.report().file_bytes == (out / "model.safetensors").stat().st_size
    found: dict[str, Any] = json.loads((out / "config.json").read_text())
    return found


def weight_of(folder: Path, own: dict[str, int], name: str) -> torch.Tensor:
    """f32 [N, K]: scale * code + bias."""
    stored, (bits, size) = load_file(folder / "model.safetensors"), (own["bits"], own["group_size"])
    words = stored[f"{name}.weight"]
    assert words.dtype == np.uint32
    streams = [int.from_bytes(row.astype("<u4").tobytes(), "little") for row in words]
    count = words.shape[1] * 32 // bits
    codes = [[stream >> bits * i & (1 << bits) - 1 for i in range(count)] for stream in streams]
    scales, biases = (
        np.repeat(stored[f"{name}.{key}"].astype(np.float32), size, 1)
        for key in ("scales", "biases")
    )
    return torch.from_numpy(scales * np.array(codes, np.float32) + biases)


@pytest.mark.parametrize(
    ("cycle", "settings"),
    [
        ((3, 4, 2, 6, 8, 5), {}),
        ((0, 3, 0, 0), {}),
        ((1, 3, 2), {"fused": False}),
        ((2, 5, 3, 4, 1), {"symmetric": True, "dtype": "float16"}),
    ],
)
def test_a_reader_gives_the_packed_weights(
    tmp_path: Path, cycle: tuple[int, ...], settings: dict[str, Any]
) -> None:
    packed = packed_model(tmp_path, "llama", cycle, hidden_size=160)
    scheme = exported(packed, tmp_path / "out", **settings)["quantization"]
    assert scheme["mode"] == "affine"
    assert {scheme[name]["group_size"] for name in packed.weights} >= {32}
    for name, weight in packed.weights.items():
        assert torch.equal(weight_of(tmp_path / "out", scheme[name], name), weight.dequantize())


def test_rotary_settings_go_by_the_names_that_mlx_lm_reads(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    packed = packed_model(tmp_path, "llama", (4,), rope_parameters=scaled)
    config = exported(packed, tmp_path / "out")
    assert config["rope_theta"] == 5e4
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_settings_of_windows_go_by_the_names_that_mlx_lm_reads(tmp_path: Path) -> None:
    packed = packed_model(tmp_path, "gemma3_text", (4,))
    config = exported(packed, tmp_path / "out")
    rope = config["rope_parameters"]
    assert config["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert config["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    kinds = config["layer_types"]
    every = config["sliding_window_pattern"]
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == list(
        range(every - 1, len(kinds), every)
    )


@pytest.mark.parametrize(
    ("kind", "stored"), [("gemma3_text", np.dtype("f4")), ("llama", np.dtype("f2"))]
)
def test_a_kept_embedding_of_gemma_is_as_wide_as_the_scales(
    tmp_path: Path, kind: str, stored: np.dtype[Any]
) -> None:
    """Its dtype is that of all activations in mlx-lm."""
    config = tiny_config(kind)
    packed = pack_model(
        save_tiny(tmp_path / "source", config, dtype="float16"), tmp_path / "packed"
    )
    exported(packed, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(packed.folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    assert embedding.dtype == stored
    assert (embedding == before["model.embed_tokens.weight"]).all()


@pytest.mark.parametrize(
    ("kind", "cycle", "changes", "settings", "problem"),
    [
        ("llama", (4,), {}, {"dtype": "float16"}, "float16 cannot hold all biases"),
        ("llama", (8,), {}, {"symmetric": True}, "groups of [8] bits fit none"),
        ("llama", (4,), {"intermediate_size": 80}, {}, "80 columns are no multiple of 32"),
        ("llama", (4,), {"hidden_act": "gelu"}, {}, "hidden_act 'gelu' is not what mlx-lm"),
        ("qwen2", (4,), {"use_sliding_window": True}, {}, "use_sliding_window True is not"),
        ("gemma2", (4,), {}, {}, "models of this type are not written"),
        (
            "gemma3_text",
            (4,),
            {"layer_types": ["full_attention", *["sliding_attention"] * 5]},
            {},
            "layer_types are not periodic",
        ),
    ],
)
def test_what_mlx_lm_would_not_compute_is_refused_by_name(
    tmp_path: Path,
    kind: str,
    cycle: tuple[int, ...],
    changes: dict[str, Any],
    settings: dict[str, Any],
    problem: str,
) -> None:
    packed = packed_model(tmp_path, kind, cycle, **changes)
    with pytest.raises(SpecError, match=re.escape(problem)):
        exported(packed, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
