"""Whole jobs on sources that say more, less or the same under other names: what is published."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.errors import ModelError
from bitmill.inference.load import load
from bitmill.pipeline.job import Result, run_job
from bitmill.pipeline.progress import Progress
from tiny import byte_tokenizer, tiny_llama

pytestmark = pytest.mark.e2e

Tensors = dict[str, torch.Tensor]
TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}


def asked(**budget: float) -> QuantizationConfig:
    return parse_config(
        {
            "budget": budget or {"bits": 4.5},
            "allocation": {"method": "uniform", "order": "natural"},
            "refinement": {"method": "rtn"},
            "calibration": {"text": TEXT, "sequences": 2, "length": 64, "held_out": 1},
            "evaluation": {"texts": ["wiki_evaluation"], "sequences": 1, "length": 64},
            "threads": 1,
        }
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def published(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job makes of the plain source."""
    folder = tmp_path_factory.mktemp("published")
    run_job(asked(), plain, folder / "work", folder / "out")
    return folder / "out"


def changed(plain: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(plain, folder)
    tensors = change(load_file(plain / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(source: Path, folder: Path, config: QuantizationConfig) -> tuple[Result, list[Progress]]:
    events: list[Progress] = []
    result = run_job(config, source, folder / "work", folder / "out", on_progress=events.append)
    return result, events


def test_what_is_left_out_is_said_and_takes_no_budget(
    plain: Path, published: Path, tmp_path: Path
) -> None:
    extra = {
        "v_head.summary.weight": torch.rand(1, 160),
        "mtp.layers.0.mlp.up_proj.weight": torch.rand(256, 160),
        "model.layers.0.self_attn.k_scale": torch.full((1,), torch.nan),
        "model.visual.blocks.0.weight": torch.ones(4, 4, 4, dtype=torch.int8),
    }
    source = changed(plain, tmp_path / "source", lambda tensors: tensors | extra)
    size = (published / "model.safetensors").stat().st_size
    result, events = run(source, tmp_path, asked(size=size))
    told = [event.message or "" for event in events if event.kind == "warning"]
    for name in extra:
        assert sum(name in message for message in told) == 1
        assert sum(name in warning for warning in result.quality.warnings) == 1
    assert load_file(tmp_path / "out/model.safetensors").keys().isdisjoint(extra)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        published / "model.safetensors"
    ).read_bytes()
    load(tmp_path / "out")


def test_wrapped_names_give_the_bytes_of_plain_ones(
    plain: Path, published: Path, tmp_path: Path
) -> None:
    def wrap(tensors: Tensors) -> Tensors:
        return {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}

    run(changed(plain, tmp_path / "source", wrap), tmp_path, asked())
    for name in ("model.safetensors", "config.json", "bit_width_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()


def test_a_last_block_that_does_not_fit_is_told_before_anything_is_computed(
    plain: Path, tmp_path: Path
) -> None:
    def cut(tensors: Tensors) -> Tensors:
        return tensors | {"model.layers.1.mlp.up_proj.weight": torch.rand(200, 160)}

    source = changed(plain, tmp_path / "source", cut)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        run(source, tmp_path, asked())
    assert caught.value.code == "bad_shape"
    assert not (tmp_path / "work").exists()


def test_a_configuration_that_transformers_cannot_build_is_told_at_plan(
    plain: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(plain, tmp_path / "source")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"silu"', '"no_such_activation"'))
    events: list[Progress] = []
    with pytest.raises(ModelError, match="transformers cannot build a llama model"):
        run_job(asked(), source, tmp_path / "work", tmp_path / "out", on_progress=events.append)
    assert {event.stage for event in events} == {"resolve", "plan"}


def test_templates_and_licences_travel_and_code_does_not(plain: Path, tmp_path: Path) -> None:
    source = shutil.copytree(plain, tmp_path / "source")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    tokenizer.save_pretrained(source)
    for name in ("License.md", "NOTICE", "use_policy.md", "tokenizer_x.py", "modeling.py"):
        (source / name).write_text("text")
    result, _ = run(source, tmp_path, asked())
    out = tmp_path / "out"
    assert AutoTokenizer.from_pretrained(out).chat_template == {"default": "D", "tool_use": "T"}
    assert {"License.md", "NOTICE", "use_policy.md"} <= result.manifest.files.keys()
    assert "additional_chat_templates/tool_use.jinja" in result.manifest.files
    assert not list(out.rglob("*.py"))
