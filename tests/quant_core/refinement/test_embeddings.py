"""Quantized embeddings and heads: whole jobs, exact sizes, exact outputs, ties kept."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig

import bitmill
from bitmill.allocation.allocator import Allocator, check_map
from bitmill.allocation.groups import GroupTable
from bitmill.allocation.profile import ProfileConfig, ProfileOrigin
from bitmill.calibration.windows import evaluation_tokens
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Budget, QuantizationConfig, parse_config
from bitmill.errors import BudgetError, FormatError, ModelError, SpecError, VerificationError
from bitmill.evaluation.compare import evaluate_folder
from bitmill.evaluation.logits import StreamedLogits, perplexity_and_kl
from bitmill.formats.accounting import footprint, measure_map, uniform_map
from bitmill.formats.codec import open_checkpoint
from bitmill.inference.embedding import QuantizedEmbedding, TiedHead
from bitmill.inference.hf_quantizer import quantized_linears
from bitmill.inference.linear import QuantizedLinear
from bitmill.inference.trellis import TrellisLinear
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.job import Result, run_job
from bitmill.pipeline.stages.verify import verify_order
from bitmill.plan.model_plan import Plan, make_plan
from bitmill.quant.trellis import trellis_shapes
from bitmill.refinement.embeddings import head_squares, round_embedding
from bitmill.sensitivity.embeddings import embedding_profiles
from bitmill.sensitivity.measure import make_profile
from tiny import CALIBRATION, VOCABULARY, llama_config, save_tiny, tiny_llama, tiny_opt
from trellis_models import pack_trellis
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
    code: str = "affine",
    baselines: Sequence[str] = (),
    **allocation: Any,
) -> QuantizationConfig:
    return parse_config(
        {
            "code": code,
            "budget": budget,
            "allocation": {"method": method, "order": "natural", "embeddings": "quantize"}
            | allocation,
            "refinement": refinement or {"method": "rtn"},
            "calibration": {"text": TEXT, "sequences": 2, "length": 64, "held_out": 1},
            "evaluation": {
                "texts": ["wiki_evaluation"],
                "sequences": 2,
                "length": 64,
                "baselines": baselines,
            },
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


TUNED = {"method": "omniquant", "omniquant": {"tune_scales_steps": 1}}
LEARNED = {"method": "omniquant", "omniquant": {"epochs": 1, "tune_scales_steps": 1}}
JOBS = {
    "tied": spec({"bits": 4.3}, "knapsack", refinement={"method": "gptq"}),
    "untied": spec({"code_bits": 4.1}, refinement=LEARNED),
    "opt": spec({"code_bits": 3.5}, "sba"),
    "tied, trellis": spec({"bits": 4.3}, "knapsack", {"method": "gptq"}, code="trellis"),
    "untied, trellis": spec({"bits": 7.5}, refinement=TUNED, code="trellis", baselines=["uniform"]),
}


@pytest.fixture(scope="module", params=list(JOBS))
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder: Path = tmp_path_factory.mktemp(request.param)
    name, asked = request.param.partition(",")[0], JOBS[request.param]
    source = MODELS[name](folder / "source")
    result = run_job(asked, source, folder / "work", folder / "out")
    return Job(name, source, folder, asked, result)


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


@pytest.fixture(scope="module", params=list(MODELS))
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linears in trellis codes beside the packed matrices."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    source = MODELS[request.param](folder / "source")
    return pack_trellis(source, folder / "packed", "quantize")


def test_beside_trellis_codes_a_model_computes_with_the_decoded_weights(
    coded: Path, tmp_path: Path
) -> None:
    model, checkpoint = bitmill.load(coded), open_checkpoint(coded)
    widths = checkpoint.bit_widths.linears
    head = model.get_output_embeddings()
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear if "lm_head" in widths else TiedHead)
    assert not isinstance(head, TrellisLinear)
    linears = [m for m in model.modules() if isinstance(m, TrellisLinear)]
    assert len(linears) == len(widths) - 1 - ("lm_head" in widths)
    expected = logits(bitmill.load(coded).dequantize())
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(f / "model.safetensors") for f in (coded, tmp_path / "saved"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    settings = [json.loads((f / "config.json").read_text()) for f in (coded, tmp_path / "saved")]
    assert settings[0]["quantization_config"] == settings[1]["quantization_config"]
    bitmill.export(coded, "dequantized", out=tmp_path / "plain", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)


def test_an_embedding_in_trellis_codes_is_refused(tmp_path: Path) -> None:
    folder = pack_trellis(tiny_llama(tmp_path / "source"), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    name = "model.embed_tokens"
    stored = load_file(folder / "model.safetensors")
    del stored[f"{name}.weight"]
    shapes = trellis_shapes(VOCABULARY, 160, (4, 4))
    stored |= {f"{name}.{key}": torch.zeros(s, dtype=d) for key, (d, s) in shapes.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"]["linears"][name] = {"widths": "44", "order": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=f"{name} is in trellis codes"):
        bitmill.load(folder)


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


def test_beside_trellis_codes_a_matrix_has_a_width_of_affine_codes(tmp_path: Path) -> None:
    asked, source = JOBS["tied, trellis"], tiny_llama(tmp_path / "source")
    plan, name = make_plan(source, asked), "model.embed_tokens"
    for widths, uniform in (
        (range(1, 9), {1: 1, 4: 4, 6: 6, 7: 6, 8: 8}),
        ((7, 8), {7: 8, 8: 8}),
        ((1, 2, 7), {7: 2}),
    ):
        allocation = asked.allocation.model_copy(update={"widths": tuple(widths)})
        groups = GroupTable(plan, allocation)
        for width, own in uniform.items():
            found = groups.named(groups.uniform(width))
            assert found[name] == (own, own)
            assert {b for key, of in found.items() if key != name for b in of} == {width}
            made = uniform_map(plan, width, widths, "natural")
            assert made.linears == found
            for kind in ("code_bits", "bits", "size"):
                counted = groups.measure(groups.uniform(width), kind)
                assert counted == measure_map(plan, made, kind)
    model = StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    (profile,) = embedding_profiles(model, tokens, range(1, 9), tmp_path, lambda *_: None)
    costs = profile.costs.sum(0)
    assert costs[6] == costs[5] > costs[7] > 0
    given = BitWidthMap.uniform(plan.shapes, 7)
    with pytest.raises(SpecError, match=f"map.linears.{name}.*'affine' has no width 7"):
        check_map(plan, asked, given)


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
