"""Plans from headers and config alone: names, parts, groups, what is kept, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, Qwen3MoeConfig

from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.errors import ModelError, SpecError
from bitmill.models.reader import CheckpointSource
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import Plan, check_lengths, check_rows, make_plan
from tiny import VOCABULARY, save_tiny, tiny_llama, tiny_opt


def spec(**changes: Any) -> QuantizationConfig:
    base = {"budget": {"code_bits": 3}}
    return parse_config(base | changes)


def rename(folder: Path, target: Path, change: Any) -> Path:
    """A copy of a tiny model whose tensors are what `change` makes of them."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors")
    return target


def test_llama_plan_is_complete_and_in_execution_order(tmp_path: Path) -> None:
    plan = make_plan(tiny_llama(tmp_path / "m"), spec())
    assert (plan.model_type, plan.block_prefix, plan.block_count) == ("llama", "model.layers", 2)
    assert (plan.hidden_size, plan.vocab_size, plan.max_positions) == (160, VOCABULARY, 512)
    assert [(li.name, li.rows, li.columns) for li in plan.block_linears(1)] == [
        ("model.layers.1.self_attn.q_proj", 160, 160),
        ("model.layers.1.self_attn.k_proj", 80, 160),
        ("model.layers.1.self_attn.v_proj", 80, 160),
        ("model.layers.1.self_attn.o_proj", 160, 160),
        ("model.layers.1.mlp.gate_proj", 256, 160),
        ("model.layers.1.mlp.up_proj", 256, 160),
        ("model.layers.1.mlp.down_proj", 160, 256),
    ]
    kept = {t.name: (t.dtype, t.shape) for t in plan.tensors}
    assert kept["model.embed_tokens.weight"] == ("F32", (VOCABULARY, 160))
    assert len(kept) == 1 + 1 + 2 * 2
    assert plan.weights == sum(li.rows * li.columns for li in plan.linears)


def test_biases_are_kept_tensors(tmp_path: Path) -> None:
    plan = make_plan(tiny_opt(tmp_path / "m"), spec())
    kept = {t.name for t in plan.tensors}
    assert all(f"{li.name}.bias" in kept for li in plan.linears)
    assert plan.siblings(0)[0] == [
        f"model.decoder.layers.0.self_attn.{x}_proj" for x in ("q", "k", "v")
    ]


def test_plan_survives_json(tmp_path: Path) -> None:
    plan = make_plan(tiny_llama(tmp_path / "m"), spec())
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.siblings(0) == plan.siblings(0)


def test_kept_linears_stay_whole(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    plan = make_plan(
        folder, spec(allocation={"keep": ["*.v_proj", "model.layers.0.*"], "kept_dtype": "source"})
    )
    assert {li.name.split(".", 2)[2] for li in plan.linears} == {
        f"1.{x}"
        for x in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    whole = make_plan(folder, spec())
    assert {t.name for t in plan.tensors} - {t.name for t in whole.tensors} == {
        f"{name}.weight" for name in set(whole.by_name) - set(plan.by_name)
    }
    model = StreamedModel(folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    assert len(model.linears(model.load_block(1), 1)) == 6
    kept = next(t for t in plan.tensors if t.name == "model.layers.1.self_attn.v_proj.weight")
    stored = load_file(folder / "model.safetensors")[kept.name]
    assert torch.equal(CheckpointSource(folder).tensor(kept), stored)


def moe_config(kind: str) -> Any:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    }
    if kind == "mixtral":
        return MixtralConfig(**common, num_local_experts=12)
    return Qwen3MoeConfig(**common, num_experts=12, moe_intermediate_size=48)


def fuse_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack qwen3_moe's experts as newer checkpoints do."""
    fused = {n: t for n, t in tensors.items() if ".experts." not in n}
    for block in range(2):
        prefix = f"model.layers.{block}.mlp.experts"
        each = [
            [tensors[f"{prefix}.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")]
            for e in range(12)
        ]
        fused[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(x[:2]) for x in each])
        fused[f"{prefix}.down_proj"] = torch.stack([x[2] for x in each])
    return fused


def test_fused_and_separate_experts_give_the_same_linears(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", moe_config("qwen3_moe"))
    fused = rename(folder, tmp_path / "fused", fuse_experts)
    first, second = make_plan(folder, spec()), make_plan(fused, spec())
    assert first.shapes == second.shapes
    assert first.input_steps(0) == second.input_steps(0)
    assert first.experts == 12
    name = "model.layers.1.mlp.experts.11.up_proj"
    sources = CheckpointSource(folder), CheckpointSource(fused)
    weights = [s.weight(p.by_name[name]) for s, p in zip(sources, (first, second), strict=True)]
    assert torch.equal(weights[0], weights[1])
    models = [
        StreamedModel(f, p, device=torch.device("cpu"), dtype=torch.float32)
        for f, p in ((folder, first), (fused, second))
    ]
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [m.run_block(1, m.load_block(1), x) for m in models]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_form_two_stages_of_one_group_each(kind: str, tmp_path: Path) -> None:
    plan = make_plan(save_tiny(tmp_path / "m", moe_config(kind)), spec())
    steps = plan.input_steps(0)
    assert [len(step) for step in steps] == [1, 1, 12, 12]
    prefix = "model.layers.0.mlp.experts"
    assert steps[2][10] == [f"{prefix}.10.gate_proj", f"{prefix}.10.up_proj"]
    assert steps[3][2] == [f"{prefix}.2.down_proj"]
    router = {t.module for t in plan.tensors if t.module.endswith("mlp.gate.weight")}
    assert router == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}


def test_kept_expert_keeps_its_rows_of_a_fused_tensor(tmp_path: Path) -> None:
    folder = rename(
        save_tiny(tmp_path / "m", moe_config("qwen3_moe")), tmp_path / "fused", fuse_experts
    )
    plan = make_plan(
        folder, spec(allocation={"keep": ["*.experts.3.up_proj"], "kept_dtype": "source"})
    )
    kept = [t for t in plan.tensors if ".experts." in t.name]
    assert [t.name for t in kept] == [
        f"model.layers.{i}.mlp.experts.3.up_proj.weight" for i in range(2)
    ]
    whole = load_file(folder / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(CheckpointSource(folder).tensor(kept[1]), whole[3, 48:])
    assert kept[1].shape == (48, 64)


def test_names_without_the_base_prefix_get_it_back(tmp_path: Path) -> None:
    """Checkpoints of the bare model, as the Hub has them of older models."""
    folder = tiny_llama(tmp_path / "m")
    bare = rename(
        folder, tmp_path / "bare", lambda ts: {n.removeprefix("model."): t for n, t in ts.items()}
    )
    first, second = make_plan(folder, spec()), make_plan(bare, spec())
    assert first.shapes == second.shapes
    assert {t.name for t in first.tensors} == {t.name for t in second.tensors}
    models = [
        StreamedModel(f, p, device=torch.device("cpu"), dtype=torch.float32)
        for f, p in ((folder, first), (bare, second))
    ]
    hidden = [m.embed(torch.arange(2, 9)[None]) for m in models]
    assert torch.equal(hidden[0], hidden[1])


def test_unfitting_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")

    def without_block(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t for n, t in tensors.items() if ".layers.1." not in n}

    with pytest.raises(ModelError, match=r"promises 2 decoder blocks.*model\.layers \(1\)"):
        make_plan(rename(folder, tmp_path / "short", without_block), spec())

    def twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"norm.weight": torch.ones(160)}

    with pytest.raises(ModelError, match="mean the same parameter"):
        make_plan(rename(folder, tmp_path / "twice", twice), spec())

    with pytest.raises(SpecError, match=r"allocation.keep \['\*'\] leaves no linear"):
        make_plan(folder, spec(allocation={"keep": ["*"]}))


def test_windows_longer_than_a_position_table_are_refused(tmp_path: Path) -> None:
    opt = make_plan(tiny_opt(tmp_path / "opt"), spec())
    with pytest.raises(SpecError, match=r"calibration\.length is 2048; the model has 512"):
        check_lengths(opt, 2048, 512)
    with pytest.raises(SpecError, match=r"evaluation\.length is 2048"):
        check_lengths(opt, 512, 2048)
    check_lengths(make_plan(tiny_llama(tmp_path / "llama"), spec()), 2048, 2048)
    model = StreamedModel(tmp_path / "opt", opt, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(SpecError, match="length is 513"):
        model.embed(torch.zeros(1, 513, dtype=torch.int64))


def test_rows_that_cannot_be_divided_among_the_devices_are_refused(tmp_path: Path) -> None:
    narrow = tiny_llama(tmp_path / "m", num_attention_heads=4, num_key_value_heads=1, head_dim=8)
    plan = make_plan(narrow, spec())
    check_rows(plan, 8)
    with pytest.raises(SpecError, match=r"devices is 9, model\.layers\.0\.\S+k_proj has 8 output"):
        check_rows(plan, 9)


def test_planning_reads_no_tensor_library(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    code = (
        "import json, sys; from pathlib import Path\n"
        "from bitmill.plan.model_plan import make_plan\n"
        "from bitmill.config.quantization import parse_config\n"
        f"asked = parse_config({spec().model_dump(mode='json')!r})\n"
        f"plan = make_plan(Path({str(folder)!r}), asked)\n"
        "bad = {'torch', 'transformers', 'safetensors', 'triton'} & set(sys.modules)\n"
        "print(json.dumps([len(plan.linears), sorted(bad)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert json.loads(done.stdout) == [14, []]
