"""Export `dequantized`: plain transformers loads it, with the weights of the packed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.errors import FormatError, InputError, SpecError, VerificationError
from bitmill.formats.dequantized.format import Dequantized
from bitmill.formats.packed.format import Packed
from bitmill.io.manifest import check_folder
from bitmill.io.safetensors import read_headers
from bitmill.pipeline.export import Export
from tiny import save_tiny, tiny_llama
from tiny_architectures import COVERED, tiny_config
from weights import PackedModel, dequantized_model, pack_model

TOKENS = torch.arange(3, 35)[None]


def exported(packed: Path, out: Path, dtype: Any = "float32") -> Path:
    Export.of(packed, Dequantized(dtype=dtype)).write(out, lambda *_: None)
    return out


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("ordered")
    source = tiny_llama(folder / "source")
    return pack_model(source, folder / "packed", order="activation", embeddings="quantize")


@pytest.mark.parametrize("model_type", sorted(COVERED))
def test_every_architecture_loads_in_plain_transformers(model_type: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", tiny_config(model_type))
    packed = pack_model(source, tmp_path / "packed")
    out = exported(packed.folder, tmp_path / "plain")
    model, info = AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = bitmill.load(packed.folder, dtype="float32").dequantize()
    with torch.no_grad():
        found, same = model(TOKENS).logits, expected(TOKENS).logits
    if any(".experts." in name for name in packed.weights):  # summed in another sequence
        torch.testing.assert_close(found, same, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, same)


def test_stored_orders_and_tied_embeddings_are_undone(ordered: PackedModel, tmp_path: Path) -> None:
    out = exported(ordered.folder, tmp_path / "plain")
    expected = dequantized_model(ordered)
    found = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in found
    for name in ordered.weights:
        assert torch.equal(found[f"{name}.weight"], expected.get_submodule(name).weight), name
    assert check_folder(out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sizes_are_said_before_anything_is_written(
    ordered: PackedModel, tmp_path: Path, dtype: Any
) -> None:
    export = Export.of(ordered.folder, Dequantized(dtype=dtype))
    said = export.report()
    assert export.write(tmp_path / "plain", lambda *_: None) == said
    files = list((tmp_path / "plain").glob("*.safetensors"))
    assert said.file_bytes == sum(file.stat().st_size for file in files)
    assert {t.name for t in export.plan.tensors} == read_headers(tmp_path / "plain").keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == getattr(torch, dtype)


def test_values_beyond_the_dtype_are_refused_and_leave_nothing(
    ordered: PackedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    for file in ordered.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 5] = 60000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj.*float16 cannot hold"):
        exported(folder, tmp_path / "plain", "float16")
    assert not (tmp_path / "plain").exists()
    exported(folder, tmp_path / "plain", "bfloat16")


def test_a_writer_that_gives_other_weights_is_caught(
    ordered: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = Export.of(ordered.folder, Dequantized(dtype="float32"))
    name, shape = "model.layers.0.mlp.down_proj", export.plan.contents.plan.shapes
    monkeypatch.setattr(
        "bitmill.formats.dequantized.codec.DequantizedFolder.weight",
        lambda self, shape: self.tensor(f"{shape.name}.weight").roll(1),
    )
    assert name in {one.name for one in shape}
    with pytest.raises(VerificationError, match="other weights"):
        export.write(tmp_path / "plain", lambda *_: None)
    assert not (tmp_path / "plain").exists()


def test_folders_are_kept_apart_and_nothing_foreign_is_replaced(
    ordered: PackedModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is the packed folder"):
        exported(ordered.folder, ordered.folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(InputError, match=r"letter\.txt"):
        exported(ordered.folder, tmp_path / "mine")
    with pytest.raises(FormatError, match="is not a packed model"):
        Export.of(ordered.source, Dequantized())
    with pytest.raises(SpecError, match="already"):
        Export.of(ordered.folder, Packed())
