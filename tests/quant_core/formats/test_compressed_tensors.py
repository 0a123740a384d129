"""Export `compressed-tensors`: the target's own library reads it, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM

from bitmill.errors import FormatError, SpecError
from bitmill.formats.compressed_tensors.format import CompressedTensors
from bitmill.formats.one_width_codes import from_words, to_words
from bitmill.formats.reading import TensorFolder
from bitmill.io.safetensors import read_headers
from bitmill.pipeline.export import Export
from tiny import save_tiny, tiny_llama
from tiny_architectures import tiny_config
from weights import PackedModel, dequantized_model, pack_model

TOKENS = torch.arange(3, 35)[None]


def exported(packed: Path, out: Path, **settings: Any) -> Path:
    Export.of(packed, CompressedTensors(**settings)).write(out, lambda *_: None)
    return out


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight as the library of the format gives it, in fp32."""
    stored = TensorFolder(folder, read_headers(folder))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {}
    for scheme in QuantizationConfig.model_validate(config).config_groups.values():
        for name in scheme.targets:
            keys = [key for key in stored.headers if key.startswith(f"{name}.weight_")]
            local = {key.removeprefix(f"{name}."): stored.tensor(key) for key in keys}
            local["weight_scale"] = local["weight_scale"].float()
            found[name] = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """Widths 1 to 8, mixed inside linears, and a short last group."""
    folder = tmp_path_factory.mktemp("packed")
    source = tiny_llama(folder / "source")
    return pack_model(source, folder / "packed", cycle=(3, 4, 2, 0, 0, 6, 8, 0, 5, 2))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("narrow")
    source = tiny_llama(folder / "source")
    return pack_model(source, folder / "packed", cycle=(3, 6, 2, 4, 5))


@pytest.mark.parametrize("fused", [True, False])
def test_the_library_s_own_decompressor_gives_the_packed_weights(
    packed: PackedModel, tmp_path: Path, fused: bool
) -> None:
    found = decompressed(exported(packed.folder, tmp_path / "out", fused=fused))
    assert found.keys() == packed.weights.keys()
    for name, weight in packed.weights.items():
        assert torch.equal(found[name], weight.dequantize()), name


def test_transformers_loads_what_has_no_zero_points_and_computes_the_same(
    narrow: PackedModel, tmp_path: Path
) -> None:
    out = exported(narrow.folder, tmp_path / "out", symmetric=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = dequantized_model(narrow)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_siblings_have_one_width_where_they_are_fused(packed: PackedModel, tmp_path: Path) -> None:
    fused, apart = (
        CompressedTensors(fused=fused).bits(
            Export.of(packed.folder, CompressedTensors()).plan.contents
        )
        for fused in (True, False)
    )
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert len({apart[name] for name in names}) > 1
    assert {fused[name] for name in names} == {max(apart[name] for name in names)}
    assert apart == {name: max(2, *w.widths) for name, w in packed.weights.items()}


@pytest.mark.parametrize("settings", [{}, {"fused": False}, {"symmetric": True}])
def test_sizes_are_said_before(narrow: PackedModel, tmp_path: Path, settings: Any) -> None:
    export = Export.of(narrow.folder, CompressedTensors(**settings))
    said = export.report()
    assert export.write(tmp_path / "out", lambda *_: None) == said
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert said.file_bytes == sum(file.stat().st_size for file in files)


def test_one_bit_groups_become_four_bits_and_stay_exact(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    packed = pack_model(source, tmp_path / "packed", cycle=(1, 2))
    out = exported(packed.folder, tmp_path / "out")
    found = decompressed(out)
    for name, weight in packed.weights.items():
        assert torch.equal(found[name], weight.dequantize()), name


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (5, 33), (130, 100)])
def test_words_hold_every_value(bits: int, shape: tuple[int, int]) -> None:
    values = torch.randint(1 << bits, shape, generator=torch.Generator().manual_seed(bits))
    values = values.to(torch.uint8)
    words = to_words(values, bits)
    assert words.shape == (shape[0], -(-shape[1] * bits // 32))
    assert torch.equal(from_words(words, bits, shape[1]), values)


def refused(source: Path, tmp_path: Path, settings: dict[str, Any], **options: Any) -> str:
    packed = pack_model(source, tmp_path / "packed", **options)
    with pytest.raises(SpecError) as caught:
        exported(packed.folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    assert caught.value.code == "format_refuses"
    return caught.value.message


def test_column_orders_are_refused_by_name(tmp_path: Path) -> None:
    said = refused(tiny_llama(tmp_path / "s"), tmp_path, {}, order="activation")
    assert "allocation.order: it has no place for column orders" in said


def test_packed_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    said = refused(tiny_llama(tmp_path / "s"), tmp_path, {}, embeddings="quantize")
    assert "model.embed_tokens: it has no packed embeddings" in said


def test_eight_bits_without_zero_points_are_refused_by_name(tmp_path: Path) -> None:
    said = refused(tiny_llama(tmp_path / "s"), tmp_path, {"symmetric": True}, cycle=(4, 8))
    assert "groups of [8] bits fit none of its widths" in said


def test_transposed_linears_are_refused_by_name(tmp_path: Path) -> None:
    said = refused(save_tiny(tmp_path / "s", tiny_config("gpt2")), tmp_path, {})
    assert "gpt2: its runtimes know no transposed linears" in said


def test_a_one_bit_scale_that_is_too_small_is_refused_by_name(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", initializer_range=1e-6)
    packed = pack_model(source, tmp_path / "packed", cycle=(1,))
    with pytest.raises(FormatError, match="1-bit groups whose scales are too small"):
        exported(packed.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
