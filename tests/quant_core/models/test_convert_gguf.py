"""GGUF files: the plan from their header equals the plan of the converted folder, bit for bit."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitmill.config.quantization import parse_config
from bitmill.errors import ModelError, ResourceError
from bitmill.io.gguf import read_gguf_header
from bitmill.models.convert_gguf import convert_gguf
from bitmill.plan.model_plan import make_plan
from tiny import VOCABULARY, byte_tokenizer, tiny_llama

SPEC = parse_config({"budget": {"code_bits": 3}})

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which GGUF keeps rotary projections: halves of a head interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def write_gguf(path: Path, folder: Path, change: Callable[[gguf.GGUFWriter], None] | None) -> Path:
    """A tiny Llama folder as a float32 GGUF file with its tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_list([*tokens[:-2], "ab", "cd"])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if change is not None:
        change(writer)
    for name, tensor in load_file(folder / "model.safetensors").items():
        value = tensor.numpy()
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            module, _, leaf = rest.rpartition(".")
            if module.endswith(("q_proj", "k_proj")):
                value = interleave_heads(value, 4 if module.endswith("q_proj") else 2)
            stored = f"blk.{index}.{NAMES[module]}.{leaf}"
        else:
            stored = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        writer.add_tensor(stored, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def source_folder(tmp_path: Path, **changes: bool) -> Path:
    return tiny_llama(
        tmp_path / "source", hidden_size=128, head_dim=32, intermediate_size=256, **changes
    )


@pytest.mark.parametrize("tied", [True, False])
def test_conversion_restores_the_model_and_the_plan(tied: bool, tmp_path: Path) -> None:
    source = source_folder(tmp_path, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "tiny.gguf", source, None)
    plan = make_plan(tmp_path, SPEC, gguf="tiny.gguf")
    assert len(plan.linears) == 14
    converted = tmp_path / "converted"
    convert_gguf(path, converted)
    assert make_plan(converted, SPEC) == plan
    expected = load_file(source / "model.safetensors")
    actual = load_file(converted / "model.safetensors")
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(f).eval() for f in (source, converted)]
        first, second = (model(tokens).logits for model in models)
    assert torch.allclose(first, second, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.decode(tokenizer("hello", add_special_tokens=False)["input_ids"]) == "hello"
    assert not list(tmp_path.glob(".*.bitmill-partial"))


def test_damaged_files_are_refused_with_the_defect(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source_folder(tmp_path), None)
    whole = path.read_bytes()
    cases = {
        "does not begin with GGUF": b"XXXX" + whole[4:],
        "version is 9": whole[:4] + (9).to_bytes(4, "little") + whole[8:],
        "number of tensors": whole[:8] + (2**40).to_bytes(8, "little") + whole[16:],
        "number of settings": whole[:16] + (2**40).to_bytes(8, "little") + whole[24:],
        "truncated": whole[:100],
        "string's length": whole[:24] + (2**50).to_bytes(8, "little") + whole[32:],
    }
    for problem, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ModelError, match=problem) as caught:
            make_plan(tmp_path, SPEC, gguf="tiny.gguf")
        assert caught.value.code == "bad_gguf"


def test_truncated_data_is_an_input_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source_folder(tmp_path), None)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"tiny\.gguf cannot be converted"):
        convert_gguf(path, tmp_path / "converted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "tiny.gguf"]


def test_rescaled_rotary_frequencies_are_refused(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(16, dtype=np.float32))

    write_gguf(tmp_path / "tiny.gguf", source_folder(tmp_path), add)
    with pytest.raises(ModelError, match="rescales its rotary frequencies"):
        make_plan(tmp_path, SPEC, gguf="tiny.gguf")


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ssm_in.weight", np.ones((4, 4), dtype=np.float32))

    write_gguf(tmp_path / "tiny.gguf", source_folder(tmp_path), add)
    with pytest.raises(ModelError, match=r"blk\.0\.ssm_in\.weight"):
        make_plan(tmp_path, SPEC, gguf="tiny.gguf")


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba' is not supported; supported are llama"):
        make_plan(tmp_path, SPEC, gguf="m.gguf")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no file m\.gguf"):
        read_gguf_header(tmp_path / "m.gguf")


def test_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    """With a limit on file sizes, which the system reports like a full disk."""
    path = write_gguf(tmp_path / "tiny.gguf", source_folder(tmp_path), None)
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old_limit[1]))
    try:
        with pytest.raises(ResourceError, match="no space left"):
            convert_gguf(path, tmp_path / "converted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert not (tmp_path / "converted").exists()


def test_refused_memory_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source_folder(tmp_path), None)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.empty(1 << 48)
    )
    with pytest.raises(ResourceError, match="memory ran out") as lacking:
        convert_gguf(path, tmp_path / "converted")
    assert lacking.value.code == "out_of_memory"
