"""Quantized embeddings and heads: whole jobs, exact sizes, exact outputs, ties kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig

import bitmill
from bitmill.allocate import Allocator
from bitmill.bits import BitWidthMap
from bitmill.blocks import StreamedModel
from bitmill.budget import footprint
from bitmill.calibration import calibration_tokens
from bitmill.checkpoint import PackedCheckpoint, read_bit_width_map
from bitmill.embeddings import head_squares, round_embedding
from bitmill.errors import BudgetError, FormatError, ModelError, VerificationError
from bitmill.hf import quantized_linears
from bitmill.measurement import evaluate_folder
from bitmill.pipeline import Result, run_job
from bitmill.plan import Plan, make_plan
from bitmill.profile import SensitivityProfile
from bitmill.quantized_embedding import TiedHead
from bitmill.spec import Budget, JobSpec, parse_spec
from tiny import VOCABULARY, llama_config, save_tiny, tiny_llama, tiny_opt

TOKENS = torch.arange(2, 26)[None]


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality bit for bit is the reference backend's promise."""
    monkeypatch.setenv("BITMILL_BACKEND", "reference")


def spec(budget: dict[str, Any], method: str = "uniform", **allocation: Any) -> JobSpec:
    return parse_spec(
        {
            "model": {"source": "path", "path": "model"},
            "budget": budget,
            "allocation": {"method": method, "order": "natural", "embeddings": "quantize"}
            | allocation,
            "refinement": {"method": "rtn"},
            "calibration": {"sequences": 2, "length": 64, "held_out": 1},
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


@pytest.fixture(scope="module", params=list(MODELS))
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return job(MODELS[request.param](folder / "source"), folder, spec({"code_bits": 4}))


class Job:
    def __init__(self, source: Path, folder: Path, asked: JobSpec, result: Result) -> None:
        self.source, self.asked, self.result = source, asked, result
        self.out, self.work = folder / "out", folder / "work"

    @property
    def plan(self) -> Plan:
        return make_plan(self.source, self.asked)

    @property
    def map(self) -> BitWidthMap:
        return read_bit_width_map(self.out)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.out.glob("*.safetensors"))


def job(source: Path, folder: Path, asked: JobSpec) -> Job:
    return Job(source, folder, asked, run_job(asked, source, folder / "work", folder / "out"))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(TOKENS).logits
    return result


def dequantized(job: Job, dtype: torch.dtype = torch.float32) -> Any:
    """The source model with every quantized matrix replaced by its dequantized values."""
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=dtype).eval()
    checkpoint = PackedCheckpoint.open(job.out)
    with torch.no_grad():
        for matrix in job.plan.matrices:
            values = checkpoint.linear(matrix.shape).unpack().dequantize()
            model.get_submodule(matrix.name).weight.copy_(values)
    return model


def test_the_checkpoint_holds_every_matrix_packed_and_once(packed: Job) -> None:
    names = {matrix.name for matrix in packed.plan.embeddings}
    assert len(names) == (1 if packed.plan.model_type in ("opt", "gemma3_text") else len(names))
    stored = load_file(packed.out / "model.safetensors")
    for name in names:
        assert f"{name}.codes_b4_p4" in stored and f"{name}.weight" not in stored
    heads = [name for name in stored if name.startswith(("lm_head.", "embed_out."))]
    assert bool(heads) == ("lm_head" in names)
    assert packed.map.linears.keys() == {s.name for s in packed.plan.shapes}


def test_sizes_are_those_on_disk_and_count_the_embeddings(packed: Job) -> None:
    row = packed.result.quality.row("uniform rtn")
    assert row.size == packed.bytes == footprint(packed.plan, packed.map).size
    assert row.code_bits == 4.0
    kept = make_plan(packed.source, spec({"code_bits": 4}, embeddings="keep"))
    rows = sum(matrix.shape.weights for matrix in packed.plan.embeddings)
    assert packed.plan.weights == kept.weights + rows
    plain = {shape.name: (4,) * shape.groups for shape in kept.shapes}
    assert packed.bytes < footprint(kept, BitWidthMap(linears=plain)).size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_answers_equal_those_of_the_dequantized_model(
    packed: Job, dtype: torch.dtype
) -> None:
    model, expected = bitmill.load(packed.out, dtype=dtype), dequantized(packed, dtype)
    assert torch.equal(logits(model), logits(expected))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    assert torch.equal(model.generate(TOKENS, **options), expected.generate(TOKENS, **options))


def test_a_cast_model_computes_in_the_new_dtype(packed: Job) -> None:
    model = bitmill.load(packed.out).to(torch.bfloat16)
    assert torch.equal(logits(model), logits(dequantized(packed, torch.bfloat16)))
    assert all(m.scales.dtype == torch.float16 for m in quantized_linears(model).values())


def test_a_tied_head_owns_no_tensor_and_a_saved_model_is_the_same(
    packed: Job, tmp_path: Path
) -> None:
    model = bitmill.load(packed.out)
    tied = len(packed.plan.embeddings) == 1
    assert isinstance(model.get_output_embeddings(), TiedHead) == tied
    model.save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (packed.out, tmp_path))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(bitmill.load(tmp_path)), logits(model))


def test_a_copy_and_the_plain_model_compute_the_same(packed: Job) -> None:
    model = bitmill.load(packed.out)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    plain = model.dequantize()
    assert not quantized_linears(plain)
    assert torch.equal(logits(plain), expected)


def test_a_headless_model_loads(packed: Job) -> None:
    base = AutoModel.from_pretrained(packed.out).eval()
    expected = dequantized(packed).base_model
    with torch.inference_mode():
        assert torch.equal(base(TOKENS).last_hidden_state, expected(TOKENS).last_hidden_state)


def test_evaluation_sees_the_quantized_matrices(packed: Job) -> None:
    """The quality report's loss is the loaded model's own."""
    measured = packed.result.quality.row("uniform rtn").texts["wiki_evaluation"]
    source = packed.result.quality.row("source").texts["wiki_evaluation"]
    again = evaluate_folder(
        packed.out,
        packed.source,
        gguf=None,
        texts=("wiki_evaluation",),
        sequences=2,
        length=64,
        device="cpu",
    )
    assert again[1].texts["wiki_evaluation"] == measured
    assert measured.kl > 0 and measured.perplexity != source.perplexity
    model = bitmill.load(packed.out).eval()
    from bitmill.calibration import evaluation_tokens

    windows = evaluation_tokens("wiki_evaluation", packed.source, length=64, sequences=2)
    with torch.inference_mode():
        nll = torch.stack([model(w[None], labels=w[None]).loss for w in windows]).mean()
    assert float(nll.exp()) == pytest.approx(measured.perplexity, rel=1e-4)


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize(
    ("method", "budget"),
    [("knapsack", {"bits": 4.3}), ("knapsack", {"size": 0}), ("sba", {"code_bits": 3.5})],
)
def test_budgets_are_kept_and_matrices_have_one_width(
    name: str, method: str, budget: dict[str, Any], tmp_path: Path
) -> None:
    source = MODELS[name](tmp_path / "source")
    if "size" in budget:
        plan = make_plan(source, spec({"bits": 8}))
        middle = BitWidthMap(linears={s.name: (4,) * s.groups for s in plan.shapes})
        budget = {"size": footprint(plan, middle).size - 1}
    made = job(source, tmp_path, spec(budget, method))
    spent = footprint(made.plan, made.map)
    assert spent.size == made.bytes
    kind, limit = next(iter(budget.items()))
    assert getattr(spent, kind) <= limit
    for matrix in made.plan.embeddings:
        assert len(set(made.map.linears[matrix.name])) == 1


def test_costs_are_measured_and_sum_to_the_whole_matrix(tmp_path: Path) -> None:
    made = job(tiny_llama(tmp_path / "source"), tmp_path, spec({"code_bits": 4}, "knapsack"))
    profile = SensitivityProfile.load(next(made.work.glob("profile*/profile.npz")))
    costs = profile.linear("model.embed_tokens").costs.sum(0)
    assert (costs > 0).all() and (np.diff(costs) < 0).all()
    loss = made.result.quality.predicted_loss
    assert loss is not None and loss > profile.linear("model.embed_tokens").costs.min(1).sum()
    allocator = Allocator(made.plan, made.asked.allocation, profile)
    rich = allocator.knapsack(Budget(code_bits=8)).linears["model.embed_tokens"]
    poor = allocator.knapsack(Budget(code_bits=2.2)).linears["model.embed_tokens"]
    assert rich == (8, 8) and poor < rich
    with pytest.raises(BudgetError):
        allocator.knapsack(Budget(code_bits=1.9))


def test_the_head_weighs_columns_by_its_input(tmp_path: Path) -> None:
    source = MODELS["untied"](tmp_path / "source")
    asked = spec({"code_bits": 4})
    plan = make_plan(source, asked)
    model = StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)
    tokens = calibration_tokens(asked.calibration, source, seed=0).tokens
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
    assert bool((other.logits(torch.ones(1, 2, 160)).diff() == 0).all())
    assert torch.equal(model.embed(TOKENS), before[0])
    assert torch.equal(model.logits(torch.ones(1, 2, 160)), before[1])


def test_kept_matrices_stay_as_they_are(tmp_path: Path) -> None:
    source = MODELS["untied"](tmp_path / "source")
    made = job(source, tmp_path, spec({"code_bits": 4}, keep=["lm_head"]))
    stored = load_file(made.out / "model.safetensors")
    assert "lm_head.weight" in stored and "model.embed_tokens.weight" not in stored
    assert torch.equal(logits(bitmill.load(made.out)), logits(dequantized(made)))


def test_a_damaged_matrix_fails_verification(tmp_path: Path) -> None:
    made = job(tiny_llama(tmp_path / "source"), tmp_path, spec({"code_bits": 4}))
    stored = load_file(made.out / "model.safetensors")
    stored["model.embed_tokens.codes_b4_p4"][0, 3, 5] ^= 1
    packed = next(made.work.glob("pack*/packed"))
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    (folder,) = made.work.glob("verify*")
    from bitmill.pipeline import verify_order

    with pytest.raises(VerificationError, match="model.embed_tokens"):
        verify_order(json.loads((folder / "order.json").read_text()))


def test_positions_cannot_pass_for_an_embedding(tmp_path: Path) -> None:
    made = job(tiny_opt(tmp_path / "source"), tmp_path, spec({"code_bits": 4}))
    config = json.loads((made.out / "config.json").read_text())
    linears = config["quantization_config"]["linears"]
    linears["model.decoder.embed_positions"] = linears.pop("model.decoder.embed_tokens")
    (made.out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="embed_positions"):
        bitmill.load(made.out)


def test_a_source_without_an_input_embedding_is_refused(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="stores no input embedding"):
        make_plan(source, spec({"code_bits": 4}))
    make_plan(source, spec({"code_bits": 4}, embeddings="keep"))
