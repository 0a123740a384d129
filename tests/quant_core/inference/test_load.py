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
from transformers import AutoModel, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer

import bitmill
from bitmill.errors import FormatError
from bitmill.inference.load import check_loads, refuse_incomplete, stand_in
from bitmill.io.safetensors import TensorInfo
from tiny import save_tiny, tiny_llama
from tiny_architectures import tiny_config
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
    config["quantization_config"]["format_version"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="format_version 5 is unknown") as refusal:
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


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t.pop(f"{VALUE}.scales"), f"{VALUE}.scales"),
        (lambda t: t.pop(next(n for n in t if n.startswith(f"{VALUE}.codes"))), f"{VALUE}.codes"),
        (lambda t: t.pop(next(n for n in t if n.startswith(f"{VALUE}.zeros"))), f"{VALUE}.zeros"),
        (lambda t: t.pop("model.layers.0.mlp.gate_proj.order"), "mlp.gate_proj.order"),
        (lambda t: t.update({f"{VALUE}.scales": torch.ones(1, 7).half()}), f"{VALUE}.scales"),
        (lambda t: t.update({f"{VALUE}.scales": t[f"{VALUE}.scales"].float()}), f"{VALUE}.scales"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith(VALUE)], VALUE),
    ],
    ids=["scales", "codes", "zeros", "order", "shape", "dtype", "all"],
)
def test_plain_transformers_refuses_what_is_missing(
    packed: PackedModel, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], name: str
) -> None:
    """It would leave the memory of missing packed tensors as it is."""
    folder = damaged(packed, tmp_path / "damaged", change)
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(("room", "loads"), [(1 << 40, 1), (1 << 16, None), (1, None)])
def test_a_sound_folder_is_proved_to_load_in_any_memory(
    packed: PackedModel, room: int, loads: int | None
) -> None:
    count = check_loads(packed.folder, {}, room=room)
    assert count == loads if loads else count > 2


@pytest.mark.parametrize("room", [1 << 40, 1])
def test_a_model_that_asks_for_weights_while_it_is_loaded_is_proved_too(
    tmp_path: Path, room: int
) -> None:
    """GPT-2 initializes projections by their parents."""
    source = save_tiny(tmp_path / "source", tiny_config("gpt2"))
    made = pack_model(source, tmp_path / "packed", order="activation")
    modules = {tensor.name: tensor.module for tensor in made.plan.tensors}
    assert check_loads(made.folder, modules, room=room) > 0


@pytest.mark.parametrize("room", [1 << 40, 1 << 16])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t.pop(f"{VALUE}.scales"), f"{VALUE}.scales"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.update({"model.v_head.weight": torch.zeros(1, 80)}), "model.v_head.weight"),
        (lambda t: t.update({f"{VALUE}.bias": torch.zeros(80)}), f"{VALUE}.bias"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), "model.norm.weight"),
        (lambda t: t.update({"lm_head.bias": torch.ones(7)}), "lm_head.bias"),
    ],
    ids=["scales", "norm", "head", "bias", "shape", "head's bias"],
)
def test_a_folder_that_does_not_load_is_told_by_name(
    packed: PackedModel,
    tmp_path: Path,
    room: int,
    change: Callable[[dict[str, Tensor]], Any],
    name: str,
) -> None:
    folder = damaged(packed, tmp_path / "damaged", change)
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        check_loads(folder, {}, room=room)


def test_other_values_in_the_model_than_in_the_files_are_told(
    packed: PackedModel, tmp_path: Path
) -> None:
    """As where two stored names mean one parameter, of which the loader keeps one."""
    folder = damaged(
        packed,
        tmp_path / "twice",
        lambda t: t.update({"norm.weight": t["model.norm.weight"] + 1}),
    )
    with pytest.raises(FormatError, match=r"norm\.weight"):
        check_loads(folder, {}, room=1 << 40)


def test_proving_takes_little_memory(packed: PackedModel) -> None:
    """Stand-ins hold one value each, however large the tensor."""
    big = TensorInfo("a", "U8", (1 << 20, 1 << 20))
    assert stand_in(big).untyped_storage().nbytes() == 1


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_are_kept_load_beside_packed_ones(tmp_path: Path, name: str) -> None:
    source = save_tiny(tmp_path / "source", tiny_config(name))
    made = pack_model(source, tmp_path / "packed", keep=("*.experts.1.*",))
    modules = {tensor.name: tensor.module for tensor in made.plan.tensors}
    assert check_loads(made.folder, modules, room=1 << 40) == 1


def test_transformers_that_name_no_model_have_the_same_conversions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source", tiny_config("mixtral"))
    model = bitmill.load(pack_model(source, tmp_path / "packed").folder)
    quantizer, given = model.hf_quantizer, [WeightRenaming("a", "b")]
    new = quantizer.update_weight_conversions(given, model)
    monkeypatch.setattr(HfQuantizer, "update_weight_conversions", lambda _, found: found)
    old = quantizer.update_weight_conversions(given)
    for one, other in zip(old, new, strict=True):
        assert one.source_patterns == other.source_patterns
        assert one.target_patterns == other.target_patterns
    assert len(old) > 1


def test_stand_ins_of_columns_name_each_once() -> None:
    assert stand_in(TensorInfo("a.order", "I32", (5,))).tolist() == [0, 1, 2, 3, 4]
    assert stand_in(TensorInfo("a.outlier_columns", "I32", (2,))).tolist() == [0, 1]
