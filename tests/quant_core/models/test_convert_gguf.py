"""GGUF files: every architecture computes what its safetensors do, and the header's every word
is carried or refused."""

from __future__ import annotations

import json
import resource
import signal
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bitmill.config.quantization import parse_config
from bitmill.errors import ModelError, ResourceError
from bitmill.io.gguf import TYPES, GgufHeader, GgufTensor, read_gguf_header
from bitmill.io.safetensors import TensorInfo
from bitmill.models.convert_gguf import convert_gguf, read_part
from bitmill.plan.gguf_models import GGUF_ARCHITECTURES, GgufPart, read_model
from bitmill.plan.model_plan import make_plan
from gguf_files import ARCHITECTURES, Header, Tensors, write_gguf
from pace import limit
from tiny import save_tiny, tiny_llama
from tiny_architectures import COMMON, COVERED

SPEC = parse_config({"budget": {"code_bits": 3}})
THETA = {"rope_theta": 5000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
LINEAR = THETA | {"rope_type": "linear", "factor": 4.0}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = THETA | {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
LOCAL = {"rope_type": "default", "rope_theta": 700.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-heads": ("llama", {"head_dim": 24}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-eps": ("llama", {"rms_norm_eps": 0.01}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3-heads": ("qwen3", {"head_dim": 24}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 24, "norm_topk_prob": True}),
    "gemma2": ("gemma2", {"head_dim": 24, "query_pre_attn_scalar": 24}),
    "gemma2-caps": (
        "gemma2",
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0, "sliding_window": 4},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 24, "query_pre_attn_scalar": 24}),
    "gemma3-rotary": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 2.0,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL},
        },
    ),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3-long": ("phi3", {"rope_parameters": LONG}),
    "phi3-partial": ("phi3", {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}}),
    "stablelm": ("stablelm", {}),
    "stablelm-2": ("stablelm", {"use_qkv_bias": True, "rope_parameters": LINEAR}),
    "stablelm-12b": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "falcon-7b": ("falcon", {"new_decoder_architecture": False}),
    "falcon-40b": ("falcon", {}),
    "falcon-11b": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "bloom": ("bloom", {}),
    "gpt2": ("gpt2", {}),
}


def tiny(name: str, folder: Path) -> Path:
    kind, changes = MODELS[name]
    config = AutoConfig.for_model(kind, **(COMMON | COVERED[kind][0] | changes))
    return save_tiny(folder, config)


@pytest.fixture(scope="module", params=sorted(MODELS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(request.param, tmp_path_factory.mktemp("source") / request.param)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(2, 250, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


def test_a_file_computes_what_its_safetensors_do(source: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source)
    plan = make_plan(tmp_path, SPEC, gguf="tiny.gguf")
    convert_gguf(path, tmp_path / "converted")
    assert make_plan(tmp_path / "converted", SPEC) == plan
    assert plan.shapes == make_plan(source, SPEC).shapes
    expected, found = logits(source), logits(tmp_path / "converted")
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_every_architecture_of_transformers_loader_is_taken() -> None:
    """Those of its table whose models Bitmill streams; mistral's own files say llama."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    theirs = {"gemma3_text" if kind == "gemma3" else kind for kind in GGUF_CONFIG_MAPPING}
    shared = theirs & COVERED.keys()
    ours = {ARCHITECTURES.get(kind, kind) for kind, _ in MODELS.values()}
    assert {ARCHITECTURES.get(kind, kind) for kind in shared} <= GGUF_ARCHITECTURES.keys()
    assert ours == GGUF_ARCHITECTURES.keys()


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "m.gguf", tiny("llama", tmp_path / "m")), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("hello", add_special_tokens=False)["input_ids"]) == "hello"
    assert not list(tmp_path.glob(".*.bitmill-partial"))


def test_a_whole_configuration_is_written(tmp_path: Path) -> None:
    """Special tokens that the header lacks do not exist."""
    convert_gguf(write_gguf(tmp_path / "m.gguf", tiny("llama", tmp_path / "m")), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["rms_norm_eps"], config["dtype"]) == (float(np.float32(1e-6)), "float32")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert config.get("pad_token_id") is None


TYPE_NAMES = {name: kind for kind, (name, _, _) in TYPES.items()}


@pytest.mark.parametrize("name", sorted(TYPE_NAMES))
def test_every_type_has_the_size_that_the_package_says(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    assert (int(kind), TYPES[kind][1:]) == (TYPE_NAMES[name], gguf.GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_quantized_tensors_are_read_in_their_shape(name: str, tmp_path: Path) -> None:
    """Against the gguf package's own dequantization, whole and element by element."""
    kind = TYPE_NAMES[name]
    _, block, size = TYPES[kind]
    columns = max(block, 64)
    random = np.random.default_rng(0)
    raw = random.integers(0, 60, (3, 5, columns // block * size), dtype=np.uint8)
    (tmp_path / "data").write_bytes(b"123" + raw.tobytes())
    tensor = GgufTensor((3, 5, columns), kind, 3, raw.size)
    header = GgufHeader(tmp_path / "data", {}, {"t": tensor})
    typed = raw.view(np.float16) if name == "F16" else raw
    expected = gguf.quants.dequantize(typed, gguf.GGMLQuantizationType(kind)).astype(np.float32)
    whole = read_part(header, GgufPart(TensorInfo("w", "F32", (3, 5, columns)), "t"))
    assert whole.dtype == np.float32
    assert np.array_equal(whole, expected)
    part = GgufPart(TensorInfo("w", "F32", (5, columns)), "t", "element", index=2)
    assert np.array_equal(read_part(header, part), expected[2])


def refusal(tmp_path: Path, kind: str, header: Header | None, change: Any = None) -> ModelError:
    """The error over a file, which the plan raises and the conversion too."""
    path = write_gguf(tmp_path / "m.gguf", tiny(kind, tmp_path / "source"), header, change)
    with pytest.raises(ModelError) as caught:
        make_plan(tmp_path, SPEC, gguf="m.gguf")
    with pytest.raises(ModelError) as again:
        convert_gguf(path, tmp_path / "out")
    assert again.value.message == caught.value.message
    assert not (tmp_path / "out").exists()
    assert "\n" not in caught.value.message
    return caught.value


UNKNOWN: list[tuple[str, Header, str]] = [
    ("llama", lambda w: w.add_float32("llama.attention.scale", 0.3), "llama.attention.scale"),
    ("llama", lambda w: w.add_logit_scale(0.0625), "llama.logit_scale"),
    ("llama", lambda w: w.add_attn_logit_softcapping(50.0), "llama.attn_logit_softcapping"),
    ("llama", lambda w: w.add_final_logit_softcapping(30.0), "llama.final_logit_softcapping"),
    ("llama", lambda w: w.add_embedding_scale(12.0), "llama.embedding_scale"),
    ("llama", lambda w: w.add_residual_scale(0.2), "llama.residual_scale"),
    ("llama", lambda w: w.add_causal_attention(False), "llama.attention.causal"),
    ("llama", lambda w: w.add_uint32("llama.some_new_key", 7), "llama.some_new_key"),
    ("llama", lambda w: w.add_array("llama.swiglu_limits", [7.0, 7.0]), "llama.swiglu_limits"),
    ("qwen2", lambda w: w.add_sliding_window(32), "qwen2.attention.sliding_window"),
    ("qwen3-heads", lambda w: w.add_clamp_kqv(8.0), "qwen3.attention.clamp_kqv"),
    ("qwen3-moe", lambda w: w.add_expert_weights_scale(2.5), "qwen3moe.expert_weights_scale"),
    ("qwen3-moe", lambda w: w.add_expert_shared_count(1), "qwen3moe.expert_shared_count"),
    ("gemma2", lambda w: w.add_uint32("gemma2.rope.freq_base_swa", 7), "gemma2.rope.freq_base_swa"),
    ("gpt2", lambda w: w.add_rope_freq_base(10000.0), "gpt2.rope.freq_base"),
    ("starcoder2", lambda w: w.add_max_alibi_bias(8.0), "starcoder2.attention.max_alibi_bias"),
    ("phi3", lambda w: w.add_expert_count(16), "phi3.expert_count"),
]


@pytest.mark.parametrize(("kind", "header", "key"), UNKNOWN, ids=[key for _, _, key in UNKNOWN])
def test_a_setting_that_cannot_be_carried_is_refused_by_name(
    kind: str, header: Header, key: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, kind, header)
    assert (error.code, error.param) == ("unsupported_architecture", key)
    assert f"{key} = " in error.message


def yarn_without_place(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_factor(4.0)


WRONG: list[tuple[str, Header, str, str]] = [
    ("llama", yarn_without_place, "llama.rope.scaling.type", "'longrope' cannot be carried"),
    (
        "llama",
        lambda w: w.add_rope_scaling_attn_factors(1.5),
        "llama.rope.scaling.attn_factor",
        "1.5 without scaling",
    ),
    (
        "llama",
        lambda w: w.add_array("llama.attention.head_count_kv", [2, 1]),
        "llama.attention.head_count_kv",
        "is not one number for all blocks",
    ),
    (
        "gemma2",
        lambda w: w.add_float32("gemma2.attention.scale", 0.3),
        "gemma2.attention.scale",
        "is no whole number's",
    ),
    (
        "gemma3",
        lambda w: w.add_sliding_window_pattern([True, False]),
        "gemma3.attention.sliding_window_pattern",
        "[True, False]",
    ),
    (
        "qwen3-moe",
        lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
        "qwen3moe.expert_gating_func",
        "is not 1, softmax",
    ),
    (
        "falcon-7b",
        lambda w: w.add_rope_dimension_count(8),
        "falcon.rope.dimension_count",
        "8 of 16 columns are rotated",
    ),
    (
        "bloom",
        lambda w: w.add_max_alibi_bias(16.0),
        "bloom.attention.max_alibi_bias",
        "it is 8 in transformers' model",
    ),
    (
        "gpt2",
        lambda w: w.add_head_count_kv(2),
        "gpt2.attention.head_count_kv",
        "it is not 4",
    ),
]


@pytest.mark.parametrize(
    ("kind", "header", "key", "said"), WRONG, ids=[key for _, _, key, _ in WRONG]
)
def test_a_value_that_cannot_be_carried_is_refused_by_name(
    kind: str, header: Header, key: str, said: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, kind, header)
    assert (error.code, error.param) == ("bad_gguf", key)
    assert said in error.message


def test_equal_numbers_for_every_block_count_as_one(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "source")
    write_gguf(
        tmp_path / "m.gguf",
        source,
        lambda w: w.add_array("llama.attention.head_count_kv", [2, 2]),
    )
    assert make_plan(tmp_path, SPEC, gguf="m.gguf").shapes == make_plan(source, SPEC).shapes


NEUTRAL: list[Header] = [
    lambda w: w.add_expert_count(0),
    lambda w: w.add_expert_used_count(0),
    lambda w: w.add_causal_attention(True),
    lambda w: w.add_logit_scale(1.0),
    lambda w: w.add_sliding_window(0),
    lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
    lambda w: w.add_rope_scaling_factor(1.0),
    lambda w: w.add_rope_scaling_finetuned(True),
    lambda w: w.add_tensor_data_layout("Meta AI original pth"),
    lambda w: w.add_vocab_size(258),
    lambda w: w.add_uint32("quantize.imatrix.entries_count", 7),
    lambda w: w.add_string("somebody.note", "hello"),
    lambda w: w.add_uint32("split.count", 1),
]


def test_settings_that_say_nothing_are_no_obstacle(tmp_path: Path) -> None:
    def header(writer: gguf.GGUFWriter) -> None:
        for add in NEUTRAL:
            add(writer)

    source = tiny("llama", tmp_path / "source")
    path = write_gguf(tmp_path / "m.gguf", source, header)
    convert_gguf(path, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_a_factor_without_a_type_is_linear(tmp_path: Path) -> None:
    """As llama.cpp reads it; `rope.scale_linear` is the factor's older name."""
    source = tiny("llama-linear", tmp_path / "source")
    plain = tiny("llama", tmp_path / "plain")
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):

        def header(writer: gguf.GGUFWriter, key: str = key) -> None:
            writer.add_float32(key, 4.0)

        config = read_model(read_gguf_header(write_gguf(tmp_path / "m.gguf", plain, header))).config
        assert config["rope_parameters"] == {"rope_type": "linear", "factor": 4.0} | {
            "rope_theta": 10000.0
        }
    assert json.loads((source / "config.json").read_text())["rope_parameters"]["factor"] == 4.0


@pytest.mark.parametrize(
    ("kind", "stored", "shape"),
    [
        ("llama", "blk.0.attn_q.bias", (64,)),
        ("llama", "blk.1.ffn_up.bias", (96,)),
        ("llama", "blk.0.attn_q_norm.weight", (16,)),
        ("llama", "blk.0.attn_sinks.weight", (4,)),
        ("llama", "blk.2.attn_norm.weight", (64,)),
        ("llama", "blk.0.ffn_gate_inp.weight", (4, 64)),
        ("llama", "blk.0.ssm_in.weight", (4, 4)),
        ("llama", "output.bias", (258,)),
        ("llama", "rope_freqs", (8,)),
        ("qwen2", "blk.0.attn_output.bias", (64,)),
        ("gemma3", "blk.0.attn_post_norm.weight", (64,)),
        ("gpt2", "rope_freqs.weight", (8,)),
        ("bloom", "position_embd.weight", (512, 64)),
    ],
)
def test_a_tensor_without_a_counterpart_is_refused_by_name(
    kind: str, stored: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[stored] = np.full(shape, 0.1, np.float32)

    error = refusal(tmp_path, kind, None, change)
    assert (error.code, error.param) == ("bad_gguf", stored)


@pytest.mark.parametrize(
    "stored", ["blk.1.ffn_norm.weight", "blk.0.attn_k.weight", "output_norm.weight"]
)
def test_a_missing_tensor_is_refused_by_name(stored: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, "llama", None, lambda tensors: tensors.pop(stored))
    assert error.code == "missing_tensor"


def test_other_rotary_factors_than_llama_3s_are_refused(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["rope_freqs.weight"] = np.linspace(1, 5, 8, dtype=np.float32)

    error = refusal(tmp_path, "llama", None, change)
    assert error.param == "rope_freqs.weight"
    assert "in another way than Llama 3" in error.message


def test_a_part_of_a_split_file_is_refused_as_such(tmp_path: Path) -> None:
    def header(writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 3)

    def first_part(tensors: Tensors) -> None:
        for name in [name for name in tensors if not name.startswith("blk.0")]:
            del tensors[name]

    error = refusal(tmp_path, "llama", header, first_part)
    assert error.code == "split_gguf"
    assert "part 1 of 3 of a split GGUF file" in error.message
    assert "llama-gguf-split --merge" in error.message


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_a_file_that_is_no_model_is_refused_as_such(kind: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, "llama", lambda writer: writer.add_type(kind))
    assert f"holds no model but '{kind}'" in error.message


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama", tmp_path / "source"))
    data = path.read_bytes()
    place = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    path.write_bytes(data[:place] + (41).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(ModelError, match=r"output_norm\.weight has the type 41; readable are F32"):
        make_plan(tmp_path, SPEC, gguf="m.gguf")


def test_damaged_files_are_refused_with_the_defect(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama", tmp_path / "source"))
    whole = path.read_bytes()
    cases = {
        "does not begin with GGUF": b"XXXX" + whole[4:],
        "version is 9": whole[:4] + (9).to_bytes(4, "little") + whole[8:],
        "number of tensors": whole[:8] + (2**40).to_bytes(8, "little") + whole[16:],
        "number of settings": whole[:16] + (2**40).to_bytes(8, "little") + whole[24:],
        "truncated at": whole[:100],
        "string's length": whole[:24] + (2**50).to_bytes(8, "little") + whole[32:],
        r"truncated: \S+ lies past": whole[:-1000],
    }
    for problem, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ModelError, match=problem) as caught:
            make_plan(tmp_path, SPEC, gguf="tiny.gguf")
        assert caught.value.code == "bad_gguf"


def header(tensors: list[bytes], settings: list[bytes]) -> bytes:
    """A GGUF file without data."""
    counts = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings))
    return counts + b"".join([*settings, *tensors])


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def strings(key: bytes, count: int) -> bytes:
    """A setting: an array of empty strings."""
    return text(key) + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)


def tensor(name: bytes, offset: int) -> bytes:
    """64 numbers in float32."""
    return text(name) + struct.pack("<IQIQ", 1, 64, 0, offset)


@pytest.mark.parametrize(
    ("tensors", "settings", "problem"),
    [
        ([], [strings(b"a", 4 << 20)], "arrays have more than 3,145,728 elements"),
        ([], [strings(b"a", 2 << 20), strings(b"b", 2 << 20)], "arrays have more than 3,145,728"),
        ([], [text(b"a") + struct.pack("<IIQ", 9, 10, 2**63)], "arrays have more than"),
        ([], [text(b"a") + struct.pack("<IB", 0, 1)] * 2, "the setting a appears twice"),
        ([], [text(b"a\x1b[2J") + struct.pack("<IB", 0, 1)], "odd characters"),
        ([tensor(b"a", 0)] * 2, [], "tensor a appears twice"),
        ([tensor(b"a\nb", 0)], [], "odd characters"),
        ([tensor(b"a", 0), tensor(b"b", 128)], [], "b overlaps the tensor before it"),
    ],
    ids=["strings", "strings in two", "numbers", "setting", "key", "tensor", "name", "overlap"],
)
def test_hostile_headers_are_refused(
    tmp_path: Path, tensors: list[bytes], settings: list[bytes], problem: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(tensors, settings) + bytes(1024))
    started = time.process_time()
    with pytest.raises(ModelError, match=problem) as caught:
        read_gguf_header(path).check_extent()
    assert caught.value.code == "bad_gguf"
    assert time.process_time() - started < limit(5)


def test_strings_are_skipped_wherever_pieces_of_the_file_end(tmp_path: Path) -> None:
    """Of lengths from nothing to more than two megabytes."""
    lengths = [0, 1, 7, 1 << 20, 9, (1 << 21) + 5, *range(2000)]
    words = b"".join(text(b"x" * length) for length in lengths)
    array = text(b"a") + struct.pack("<IIQ", 9, 8, len(lengths)) + words
    for before in range(0, 24):
        settings = [text(b"b" * (1 + before)) + struct.pack("<IB", 0, 1), array]
        whole = header([], [*settings, text(b"after") + struct.pack("<IB", 0, 7)])
        path = tmp_path / "m.gguf"
        path.write_bytes(whole + bytes(64))
        assert read_gguf_header(path).settings["after"] == 7
    for cut in (1, 1999, 2007, 1 << 21):
        path.write_bytes(header([], settings)[:-cut])
        with pytest.raises(ModelError, match="truncated at"):
            read_gguf_header(path)


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba' is not supported; supported are bloom"):
        make_plan(tmp_path, SPEC, gguf="m.gguf")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no file m\.gguf"):
        read_gguf_header(tmp_path / "m.gguf")


def test_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    """With a limit on file sizes, which the system reports like a full disk."""
    source = tiny_llama(tmp_path / "source", hidden_size=128, head_dim=32)
    path = write_gguf(tmp_path / "tiny.gguf", source)
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old_limit[1]))
    try:
        with pytest.raises(ResourceError, match="no space is left"):
            convert_gguf(path, tmp_path / "converted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert not (tmp_path / "converted").exists()


def test_refused_memory_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama", tmp_path / "source"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: torch.empty(1 << 48))
    with pytest.raises(ResourceError, match="memory ran out") as lacking:
        convert_gguf(path, tmp_path / "converted")
    assert lacking.value.code == "out_of_memory"
