"""Quantized embeddings and heads: whole jobs, exact sizes, exact outputs, ties kept."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig

import bitmill
from bitmill.allocation.allocator import Allocator
from bitmill.allocation.profile import ProfileConfig, ProfileOrigin
from bitmill.calibration.windows import evaluation_tokens
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Budget, QuantizationConfig, parse_config
from bitmill.errors import BudgetError, FormatError, ModelError, VerificationError
from bitmill.evaluation.compare import evaluate_folder
from bitmill.evaluation.logits import StreamedLogits, perplexity_and_kl
from bitmill.formats.accounting import footprint
from bitmill.formats.codec import open_checkpoint
from bitmill.inference.embedding import TiedHead
from bitmill.inference.hf_quantizer import quantized_linears
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.job import Result, run_job
from bitmill.pipeline.stages.verify import verify_order
from bitmill.plan.model_plan import Plan, make_plan
from bitmill.refinement.embeddings import head_squares, round_embedding
from bitmill.sensitivity.measure import make_profile
from tiny import CALIBRATION, VOCABULARY, llama_config, save_tiny, tiny_llama, tiny_opt
from weights import PackedModel, dequantized_model, pack_model

TOKENS = torch.arange(2, 26)[None]
TEXT = {"source": "file", "path": str(CALIBRATION)}


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality bit for bit is the reference backend's promise."""
    monkeypatch.setenv("BITMILL_BACKEND", "reference")


def spec(
    budget: dict[str, Any],
    method: str = "uniform",
    refinement: dict[str, Any] | None = None,
    **allocation: Any,
) -> QuantizationConfig:
    return parse_config(
        {
            "budget": budget,
            "allocation": {"method": method, "order": "natural", "embeddings": "quantize"}
            | allocation,
            "refinement": refinement or {"method": "rtn"},
            "calibration": {"text": TEXT, "sequences": 2, "length": 64, "held_out": 1},
            "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": 64},
            "threads": 1,
        }
    )


MODELS = {
    "tied": lambda folder: tiny_llama(folder),
    "untied": lambda folder: save_tiny(folder, llama_config(tie_word_embeddings=False)),
    "opt": lambda folder: tiny_opt(folder),
    "gemma3": lambda folder: save_tiny(folder, gemma3()),
    "neox": lambda folder: save_tiny(folder, neox()),
}


def gemma3() -> Gemma3TextConfig:
    """Tied, and its embedding is multiplied by sqrt(D)."""
    return Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        sliding_window=32,
        bos_token_id=0,
        eos_token_id=1,
    )


def neox() -> GPTNeoXConfig:
    """Its head is stored under another name than its module's."""
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )


@dataclass(frozen=True)
class Job:
    """A finished job and its folders."""

    name: str
    source: Path
    folder: Path
    asked: QuantizationConfig
    result: Result

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def plan(self) -> Plan:
        return make_plan(self.source, self.asked)

    @property
    def map(self) -> BitWidthMap:
        return open_checkpoint(self.out).bit_widths

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.out.glob("*.safetensors"))

    def work(self, pattern: str) -> Path:
        return next((self.folder / "work").glob(pattern))


LEARNED = {"method": "omniquant", "omniquant": {"epochs": 1, "tune_scales_steps": 1}}
JOBS = {
    "tied": spec({"bits": 4.3}, "knapsack", refinement={"method": "gptq"}),
    "untied": spec({"code_bits": 4.1}, refinement=LEARNED),
    "opt": spec({"code_bits": 3.5}, "sba"),
}


@pytest.fixture(scope="module", params=list(JOBS))
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder: Path = tmp_path_factory.mktemp(request.param)
    source, asked = MODELS[request.param](folder / "source"), JOBS[request.param]
    result = run_job(asked, source, folder / "work", folder / "out")
    return Job(request.param, source, folder, asked, result)


@pytest.fixture(scope="module", params=list(MODELS))
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """Every matrix rounded, neighbouring groups to different widths."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    source = MODELS[request.param](folder / "source")
    return pack_model(source, folder / "packed", embeddings="quantize")


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(TOKENS).logits
    return result


def heads(packed: PackedModel) -> int:
    return len([matrix for matrix in packed.plan.embeddings if matrix.name == "lm_head"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_answers_equal_those_of_the_dequantized_model(
    packed: PackedModel, dtype: torch.dtype
) -> None:
    model, expected = bitmill.load(packed.folder, dtype=dtype), dequantized_model(packed, dtype)
    assert torch.equal(logits(model), logits(expected))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    assert torch.equal(model.generate(TOKENS, **options), expected.generate(TOKENS, **options))


def test_a_cast_model_computes_in_the_new_dtype(packed: PackedModel) -> None:
    model = bitmill.load(packed.folder).to(torch.bfloat16)
    assert torch.equal(logits(model), logits(dequantized_model(packed).to(torch.bfloat16)))
    assert all(m.scales.dtype == torch.float16 for m in quantized_linears(model).values())


def test_a_tied_head_owns_no_tensor_and_a_saved_model_is_the_same(
    packed: PackedModel, tmp_path: Path
) -> None:
    model = bitmill.load(packed.folder)
    assert isinstance(model.get_output_embeddings(), TiedHead) == (not heads(packed))
    model.save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (packed.folder, tmp_path))
    assert any(name.startswith("lm_head.") for name in before) == bool(heads(packed))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(bitmill.load(tmp_path)), logits(model))


def test_a_copy_and_the_plain_model_compute_the_same(packed: PackedModel) -> None:
    model = bitmill.load(packed.folder)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    plain = model.dequantize()
    assert not quantized_linears(plain)
    assert torch.equal(logits(plain), expected)


def test_a_headless_model_loads(packed: PackedModel) -> None:
    base, expected = AutoModel.from_pretrained(packed.folder), dequantized_model(packed).base_model
    with torch.inference_mode():
        hidden = base.eval()(TOKENS).last_hidden_state
        assert torch.equal(hidden, expected(TOKENS).last_hidden_state)


def test_positions_cannot_pass_for_an_embedding(tmp_path: Path) -> None:
    folder = pack_model(tiny_opt(tmp_path / "source"), tmp_path / "packed").folder
    config = json.loads((folder / "config.json").read_text())
    linears = config["quantization_config"]["linears"]
    linears["model.decoder.embed_positions"] = {"widths": "4", "order": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="embed_positions"):
        bitmill.load(folder)


def test_a_kept_head_stays_as_it_is(tmp_path: Path) -> None:
    source = MODELS["untied"](tmp_path / "source")
    plan = make_plan(source, spec({"code_bits": 4}, keep=["lm_head"]))
    assert [matrix.name for matrix in plan.embeddings] == ["model.embed_tokens"]
    assert "lm_head.weight" in {tensor.name for tensor in plan.tensors}


def test_a_source_without_an_input_embedding_is_refused(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="stores no input embedding"):
        make_plan(source, spec({"code_bits": 4}))
    make_plan(source, spec({"code_bits": 4}, embeddings="keep"))


def test_a_job_keeps_its_budget_and_counts_the_embeddings(job: Job) -> None:
    row, spent = job.result.quality.rows[1], footprint(job.plan, job.map)
    assert row.size == job.bytes == spent.size
    budget = job.asked.budget
    assert 0.85 * budget.value < getattr(spent, budget.kind) <= budget.value
    assert job.map.linears.keys() == {shape.name for shape in job.plan.shapes}
    kept = make_plan(job.source, spec({"code_bits": 4}, embeddings="keep"))
    rows = sum(matrix.shape.weights for matrix in job.plan.embeddings)
    assert rows == (2 if job.name == "untied" else 1) * VOCABULARY * job.plan.hidden_size
    assert job.plan.weights == kept.weights + rows
    for matrix in job.plan.embeddings:
        assert len(set(job.map.linears[matrix.name])) == 1


def test_evaluation_and_report_see_the_quantized_matrices(job: Job) -> None:
    """The report's loss is the loaded model's own, and evaluating the folder gives it again."""
    measured = job.result.quality.rows[1].texts["wiki_evaluation"]
    again = evaluate_folder(
        job.out,
        job.source,
        gguf=None,
        texts=("wiki_evaluation",),
        sequences=2,
        length=64,
        device="cpu",
    )
    assert again[1].texts["wiki_evaluation"] == measured
    model = bitmill.load(job.out).eval()
    windows = evaluation_tokens("wiki_evaluation", job.source, length=64, sequences=2)
    with torch.inference_mode():
        nll = torch.stack([model(w[None], labels=w[None]).loss for w in windows]).mean()
    assert float(nll.exp()) == pytest.approx(measured.perplexity, rel=1e-5)
    reported = {linear.name: linear for linear in job.result.quality.linears}
    for matrix in job.plan.embeddings:
        assert 0 < reported[matrix.name].relative_error < 0.5


def test_a_damaged_matrix_fails_verification(job: Job, tmp_path: Path) -> None:
    order = json.loads((job.work("verify*") / "order.json").read_text())
    copied = shutil.copytree(job.out, tmp_path / "copy")
    stored = load_file(copied / "model.safetensors")
    name = job.plan.embeddings[0].name
    next(v for k, v in stored.items() if k.startswith(f"{name}.codes_"))[0, 3, 5] ^= 1
    save_file(stored, copied / "model.safetensors", metadata={"format": "pt"})
    order |= {"folder": str(copied), "report": str(tmp_path / "report.json")}
    order["plan"] = str(job.work("verify*") / "plan.json")
    with pytest.raises(VerificationError, match=re.escape(name)):
        verify_order(order)


def test_budgets_spend_on_the_embedding_what_its_measured_cost_is_worth(
    tmp_path: Path,
) -> None:
    asked, source = JOBS["tied"], tiny_llama(tmp_path / "source")
    plan = make_plan(source, asked)
    model = StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)
    config = ProfileConfig(kind="knapsack", widths=(2, 3, 4, 5, 6, 8), order="natural")
    tokens = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    profile = make_profile(
        model,
        tokens,
        plan,
        ProfileOrigin(config, "model", "text"),
        folder=tmp_path,
        on_unit=lambda *_: None,
    )
    name = "model.embed_tokens"
    costs = profile.linear(name).costs.sum(0)
    assert (costs > 0).all()
    assert (np.diff(costs) < 0).all()
    squares = head_squares(model, tokens)
    rounded, _ = round_embedding(model, plan.by_name[name], (3, 3), squares)
    other = StreamedLogits(model.with_matrices({name: rounded.dequantize()}))
    measured = perplexity_and_kl(StreamedLogits(model), other, tokens)
    assert costs[1] == pytest.approx(float(measured.kl.mean()))
    allocator = Allocator(plan, asked.allocation, profile)
    assert allocator.knapsack(Budget(code_bits=8)).linears[name] == (8, 8)
    assert allocator.knapsack(Budget(code_bits=2.2)).linears[name] < (8, 8)
    for value in (60_000, 90_000, 120_000, 150_000):
        assert footprint(plan, allocator.knapsack(Budget(size=value * 3))).size <= value * 3
    with pytest.raises(BudgetError):
        allocator.knapsack(Budget(code_bits=1.9))


def test_the_head_weighs_columns_by_its_input(tmp_path: Path) -> None:
    source = MODELS["untied"](tmp_path / "source")
    asked = spec({"code_bits": 4})
    plan = make_plan(source, asked)
    model = StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.inference_mode():
        hidden = whole.model(tokens).last_hidden_state
    squares = head_squares(model, tokens)
    torch.testing.assert_close(squares, hidden.square().mean((0, 1)), rtol=1e-4, atol=1e-6)
    skewed = squares * torch.linspace(0.01, 100, 160)
    by_name = {matrix.name: matrix for matrix in plan.embeddings}
    for name, weighed in (("lm_head", True), ("model.embed_tokens", False)):
        first, second = (
            round_embedding(model, by_name[name], (2, 2), s)[0] for s in (squares, skewed)
        )
        assert torch.equal(first.codes, second.codes) != weighed


def test_other_matrices_leave_the_model_itself_alone(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    plan = make_plan(source, spec({"code_bits": 4}))
    model = StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)
    before = model.embed(TOKENS), model.logits(torch.ones(1, 2, 160))
    other = model.with_matrices({"model.embed_tokens": torch.ones(VOCABULARY, 160)})
    assert torch.equal(other.embed(TOKENS), torch.ones(1, 24, 160))
    assert other.logits(torch.ones(1, 2, 160)).std() < 1e-3
    assert torch.equal(model.embed(TOKENS), before[0])
    assert torch.equal(model.logits(torch.ones(1, 2, 160)), before[1])
