"""Export `w8a8`: compressed-tensors reads it, and rounds activations as reports measure it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import (
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitmill.errors import FormatError, ModelError, SpecError
from bitmill.evaluation.activations.grids import fp8_tokens
from bitmill.formats.reading import TensorFolder
from bitmill.formats.w8a8.format import DTYPES, W8A8
from bitmill.io.safetensors import READABLE, read_headers
from bitmill.pipeline.export import Export
from tiny import save_tiny, tiny_llama
from tiny_architectures import tiny_config
from weights import PackedModel, dequantized_model, pack_model

TOKENS = torch.arange(3, 35)[None]
KINDS = ("int8", "fp8")


def exported(packed: Path, out: Path, dtype: Any) -> Path:
    Export.of(packed, W8A8(dtype=dtype)).write(out, lambda *_: None)
    return out


def rounded(weight: Tensor, dtype: str) -> Tensor:
    """f32 [N, K], each row on 255 integers around 0, or in E4M3 up to 448."""
    largest = weight.abs().amax(1, keepdim=True)
    if dtype == "int8":
        return torch.round(weight / (largest / 127)) * (largest / 127)
    return (weight / (largest / 448)).to(torch.float8_e4m3fn).float() * (largest / 448)


def as_the_library_rounds_int8(x: Tensor) -> Tensor:
    """Its step is a 255th of the range, where engines' is a 254th."""
    step = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / step).round().clamp(-128, 127) * step


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """Mixed widths, columns in another order."""
    folder = tmp_path_factory.mktemp("packed")
    source = tiny_llama(folder / "source")
    return pack_model(source, folder / "packed", order="activation", cycle=(3, 8, 6, 4))


@pytest.mark.parametrize("dtype", KINDS)
def test_the_library_s_own_decompressor_gives_weights_of_eight_bits(
    packed: PackedModel, tmp_path: Path, dtype: str
) -> None:
    out = exported(packed.folder, tmp_path / "out", dtype)
    stored = TensorFolder(out, read_headers(out, (*READABLE, *DTYPES.values())))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    compressor = {"int8": IntQuantizationCompressor, "fp8": FloatQuantizationCompressor}[dtype]
    for name, weight in packed.weights.items():
        keys = ("weight", "weight_scale")
        local = {key: stored.tensor(f"{name}.{key}") for key in keys}
        assert local["weight"].element_size() == 1
        found = compressor.decompress(local, scheme)["weight"]
        expected = rounded(weight.dequantize(), dtype)
        torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("dtype", "inputs"), [("int8", as_the_library_rounds_int8), ("fp8", fp8_tokens)]
)
def test_transformers_loads_it_and_rounds_activations_token_by_token(
    packed: PackedModel, tmp_path: Path, dtype: str, inputs: Callable[[Tensor], Tensor]
) -> None:
    out = exported(packed.folder, tmp_path / "out", dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = dequantized_model(packed)
    for name, weight in packed.weights.items():
        linear = expected.get_submodule(name)
        linear.weight.data = rounded(weight.dequantize(), dtype)
        linear.register_forward_pre_hook(lambda _, args: (inputs(args[0]),))
    with torch.no_grad():
        found, same = model(TOKENS).logits, expected(TOKENS).logits
        plain = dequantized_model(packed)(TOKENS).logits
    assert (found - same).norm() < 1e-3 * same.norm()
    assert (found - plain).norm() > 5e-3 * same.norm()


@pytest.mark.parametrize("dtype", KINDS)
def test_sizes_are_said_before(packed: PackedModel, tmp_path: Path, dtype: Any) -> None:
    export = Export.of(packed.folder, W8A8(dtype=dtype))
    said = export.report()
    assert export.write(tmp_path / "out", lambda *_: None) == said
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert said.file_bytes == sum(file.stat().st_size for file in files)


def test_rows_of_zeros_stay_zero(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    packed = pack_model(source, tmp_path / "packed", cycle=(0,))
    for dtype in KINDS:
        out = exported(packed.folder, tmp_path / dtype, dtype)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            assert torch.isfinite(model(TOKENS).logits).all()


def test_every_architecture_s_kept_linears_are_left_alone(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", tiny_config("mixtral"))
    packed = pack_model(source, tmp_path / "packed")
    out = exported(packed.folder, tmp_path / "out", "int8")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    headers = read_headers(out)
    ignored = [name for name in config["ignore"] if f"{name}.weight" in headers]
    assert any("gate" in name for name in ignored)
    for name, tensor in headers.items():
        if name.endswith(".weight") and len(tensor.shape) == 2:
            kept = name.removesuffix(".weight") in ignored
            assert kept == (f"{name}_scale" not in headers), name


def test_floats_of_eight_bits_are_no_source(packed: PackedModel, tmp_path: Path) -> None:
    out = exported(packed.folder, tmp_path / "out", "fp8")
    with pytest.raises(ModelError, match="has dtype F8_E4M3"):
        read_headers(out)


def refused(source: Path, tmp_path: Path, **options: Any) -> str:
    packed = pack_model(source, tmp_path / "packed", **options)
    with pytest.raises(SpecError) as caught:
        exported(packed.folder, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()
    return caught.value.message


def test_packed_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    said = refused(tiny_llama(tmp_path / "s"), tmp_path, embeddings="quantize")
    assert "model.embed_tokens: it has no packed embeddings" in said


def test_transposed_linears_are_refused_by_name(tmp_path: Path) -> None:
    said = refused(save_tiny(tmp_path / "s", tiny_config("gpt2")), tmp_path)
    assert "gpt2: its runtimes know no transposed linears" in said


def test_an_export_is_no_packed_folder_and_says_so(packed: PackedModel, tmp_path: Path) -> None:
    folder = exported(packed.folder, tmp_path / "out", "int8")
    with pytest.raises(FormatError, match="not a packed model: its quant_method is 'compressed-"):
        Export.of(folder, W8A8())
