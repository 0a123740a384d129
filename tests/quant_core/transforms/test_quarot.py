"""Transform "quarot": rotations that are folded into the source before all else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.quantization import parse_config
from bitmill.errors import Cancelled, InputError, ModelError, SpecError
from bitmill.evaluation.compare import evaluate_folder
from bitmill.formats.accounting import footprint
from bitmill.inference.load import load
from bitmill.models.rewrite_source import rewrite_source
from bitmill.pipeline.admission import admit
from bitmill.pipeline.job import run_job
from bitmill.plan.architectures import ARCHITECTURES
from bitmill.plan.model_plan import make_plan
from bitmill.transforms.quarot.folding import Turn
from bitmill.transforms.quarot.settings import STREAMS, VALUES, QuaRot, Stream
from tiny import VOCABULARY, save_tiny, tiny_llama
from tiny_architectures import COVERED, tiny_config

TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}
BOTH = ("residual", "values")
EVALUATED: dict[str, Any] = {"texts": ("wiki_evaluation",), "sequences": 1, "length": 64}


def config(**changes: Any) -> Any:
    base: dict[str, Any] = {
        "budget": {"code_bits": 8},
        "allocation": {"method": "uniform", "order": "natural"},
        "refinement": {"method": "rtn", "transforms": [{"name": "quarot"}]},
        "calibration": {"text": TEXT, "sequences": 4, "length": 64, "held_out": 1},
        "evaluation": EVALUATED,
        "threads": 1,
    }
    return parse_config(base | changes)


def tokens() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


def uneven(folder: Path) -> Path:
    """The model with norms and biases like no other, and channels of very different size."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor += noise + 4 * (noise > 0.9)
        else:
            tensor[..., ::17] *= 4
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens()).logits
        return found


def chosen(folder: Path) -> BitWidthMap:
    return BitWidthMap.load(folder / MAP_NAME)


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [1, 2, 12, 40, 96, 128, 160, 576, 1024])
def test_a_turn_is_orthogonal_and_leaves_no_outlier(size: int, keeps_mean: bool) -> None:
    turn = Turn(size, keeps_mean)
    Q = turn.rows(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(Q @ Q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(turn.columns(Q), torch.eye(size, dtype=torch.float64), atol=1e-12)
    if keeps_mean:
        assert torch.allclose(Q.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-12)
    else:
        assert Q.abs().amax() <= (2 / size) ** 0.5 + 1e-12 or size == 1
    if size >= 96:
        assert Q.abs().amax() < 5 / size**0.5
    gain = torch.arange(1, size + 1).double()
    assert torch.allclose(turn.rows(torch.ones(2, size).double(), gain), (gain @ Q).expand(2, -1))


@pytest.mark.parametrize("parts", [("residual",), ("values",), BOTH], ids="+".join)
@pytest.mark.parametrize("name", COVERED)
def test_the_model_computes_the_same_or_is_refused(
    tmp_path: Path, name: str, parts: tuple[Any, ...]
) -> None:
    source = uneven(save_tiny(tmp_path / "source", tiny_config(name)))
    reasons = {"residual": STREAMS[name], "values": VALUES[name]}
    refused = [part for part in parts if isinstance(reasons[part], str)]
    if refused:
        with pytest.raises(ModelError, match=re.escape(f"{refused[0]!r} of a {name} model: ")):
            rewrite_source(source, tmp_path / "out", [QuaRot(parts=parts)])
        assert not (tmp_path / "out").exists()
        return
    rewrite_source(source, tmp_path / "out", [QuaRot(parts=parts)])
    before, after = logits(source), logits(tmp_path / "out")
    assert (after - before).norm() < 1e-5 * before.norm()
    assert (after - before).abs().amax() < 1e-4 * before.abs().amax()
    a, b = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    same = {key for key in a.keys() & b.keys() if torch.equal(a[key], b[key])}
    turned = [key for key in a.keys() & b.keys() if a[key].dim() > 1 and key not in same]
    assert len(turned) >= (2 if parts == ("values",) else 8)


def test_what_is_rotated_and_what_not_is_said_of_every_architecture() -> None:
    assert STREAMS.keys() == VALUES.keys() == ARCHITECTURES.keys() == COVERED.keys()
    rotated = {name for name, stream in STREAMS.items() if isinstance(stream, Stream)}
    assert rotated >= {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
    ],
)
def test_tied_heads_and_biases(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = uneven(tiny_llama(tmp_path / "source", **changes))
    rewrite_source(source, tmp_path / "out", [QuaRot()])
    before, after = logits(source), logits(tmp_path / "out")
    assert (after - before).norm() < 1e-5 * before.norm()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored["model.norm.weight"], torch.ones(160))


def test_a_tie_stays_where_only_values_are_rotated(tmp_path: Path) -> None:
    plan = make_plan(
        tiny_llama(tmp_path / "source"),
        config(refinement={"transforms": [{"name": "quarot", "parts": ["values"]}]}),
    )
    assert "lm_head.weight" not in {tensor.name for tensor in plan.tensors}


def test_a_model_of_two_bytes_a_weight_keeps_its_precision(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", dtype="bfloat16")
    rewrite_source(source, tmp_path / "out", [QuaRot()])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    before, after = logits(source), logits(tmp_path / "out")
    assert (after - before).float().norm() < 0.05 * before.float().norm()


def test_factors_near_0_that_a_bias_would_be_divided_by_are_refused(tmp_path: Path) -> None:
    source = uneven(save_tiny(tmp_path / "source", tiny_config("stablelm")))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 0.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"cannot fold model\.layers\.1\.input_layernorm: some"):
        rewrite_source(source, tmp_path / "out", [QuaRot()])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["queries", "keys", "down"])
def test_what_is_rotated_while_a_model_runs_is_refused_with_the_reason(part: str) -> None:
    asked = {"transforms": [{"name": "quarot", "parts": [part]}]}
    with pytest.raises(SpecError, match=f"{part!r} would have to be rotated while the model runs"):
        config(refinement=asked)


def test_other_parts_and_none_are_refused() -> None:
    for parts in (["nothing"], []):
        with pytest.raises(SpecError, match=r"transforms\.0\.parts"):
            config(refinement={"transforms": [{"name": "quarot", "parts": parts}]})


def test_a_model_without_the_parts_is_refused_before_a_job(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", tiny_config("gemma3_text"))
    with pytest.raises(ModelError, match=r"norms behind attention.*give parts \['values'\]"):
        admit(source, config())


@pytest.mark.e2e
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"refinement": {"method": "gptq", "transforms": [{"name": "quarot"}, {"name": "awq"}]}},
        {"refinement": {"method": "omniquant", "transforms": [{"name": "quarot"}]}},
        {"allocation": {"method": "sba"}, "budget": {"code_bits": 4}},
        {"allocation": {"method": "knapsack", "order": "activation"}, "budget": {"bits": 4.3}},
        {"allocation": {"method": "uniform", "embeddings": "quantize"}},
        {"code": "trellis", "budget": {"code_bits": 4}, "allocation": {"method": "uniform"}},
    ],
    ids=["rtn", "gptq", "omniquant", "sba", "knapsack", "embeddings", "trellis"],
)
def test_a_job_is_stored_loaded_and_measured_against_its_source(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = uneven(tiny_llama(tmp_path / "source"))
    asked = config(**changes)
    result = run_job(asked, source, tmp_path / "work", tmp_path / "out")
    plan = admit(source, asked).plan
    size = sum(file.stat().st_size for file in result.folder.glob("*.safetensors"))
    assert size == footprint(plan, chosen(result.folder)).size == result.quality.rows[-1].size
    before = logits(source)
    with torch.no_grad():
        after = load(result.folder)(tokens()).logits
    kl = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert kl / before.shape[1] < (0.5 if asked.budget.value < 5 else 0.01)
    rows = evaluate_folder(result.folder, source, gguf=None, device="cpu", **EVALUATED)
    own = result.quality.rows[-1].texts["wiki_evaluation"].kl
    assert rows[-1].texts["wiki_evaluation"].kl == pytest.approx(own, rel=1e-3, abs=1e-6)


@pytest.mark.e2e
def test_a_result_is_dequantized_and_told_from_other_models(tmp_path: Path) -> None:
    source = uneven(tiny_llama(tmp_path / "source"))
    result = run_job(config(), source, tmp_path / "work", tmp_path / "out")
    bitmill.export(result.folder, "dequantized", out=tmp_path / "floats")
    before, after = logits(source), logits(tmp_path / "floats")
    assert (after - before).norm() < 0.1 * before.norm()
    other = tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="was not made from"):
        evaluate_folder(result.folder, other, gguf=None, device="cpu", **EVALUATED)
    again = run_job(
        config(refinement={"method": "rtn"}), tmp_path / "floats", tmp_path / "w", tmp_path / "o"
    )
    evaluate_folder(again.folder, tmp_path / "floats", gguf=None, device="cpu", **EVALUATED)


@pytest.mark.e2e
def test_a_map_of_a_rotated_job_is_given_to_another(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    allocation = {"method": "knapsack", "embeddings": "quantize"}
    asked = config(allocation=allocation, budget={"bits": 4.5})
    result = run_job(asked, source, tmp_path / "work", tmp_path / "out")
    widths = chosen(result.folder)
    assert "lm_head" in widths.linears
    given = bitmill.refine(source, widths, asked, out=tmp_path / "given", budget={"bits": 4.5})
    assert chosen(given.folder) == widths


@pytest.mark.e2e
def test_a_job_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    whole = run_job(config(), source, tmp_path / "work", tmp_path / "whole")
    for stage in ("resolve", "refine"):
        events: list[Any] = []
        with pytest.raises(Cancelled):
            run_job(
                config(),
                source,
                tmp_path / "resumed",
                tmp_path / "out",
                on_progress=events.append,
                should_stop=lambda stage=stage, events=events: any(
                    e.stage == stage and e.kind == "progress" for e in events
                ),
            )
    resumed = run_job(config(), source, tmp_path / "resumed", tmp_path / "out")
    for file in ("model.safetensors", "config.json"):
        assert (resumed.folder / file).read_bytes() == (whole.folder / file).read_bytes()


@pytest.mark.e2e
def test_a_profile_is_of_the_rotated_model(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    allocation = {"method": "knapsack"}
    ids = {
        run_job(
            config(allocation=allocation, budget={"bits": 4.3}, refinement={"transforms": asked}),
            source,
            tmp_path / f"work-{i}",
            tmp_path / f"out-{i}",
            profile_folder=tmp_path / "profiles",
        ).profile_id
        for i, asked in enumerate(([], [{"name": "quarot"}], [{"name": "quarot"}]))
    }
    assert len(ids) == 2
