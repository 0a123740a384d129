"""Whole jobs with trellis codes on tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import (
    LinearProfile,
    ProfileConfig,
    ProfileOrigin,
    SensitivityProfile,
)
from bitmill.calibration.loss_weights import loss_weights
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import parse_config
from bitmill.errors import SpecError
from bitmill.formats.accounting import footprint
from bitmill.formats.codec import open_checkpoint
from bitmill.formats.format import FORMATS
from bitmill.inference.trellis import TrellisLinear
from bitmill.io.atomic import beside
from bitmill.io.manifest import check_folder
from bitmill.pipeline.admission import admit
from bitmill.pipeline.job import run_job
from bitmill.pipeline.work_folder import FORMER_WEIGHTS_FOLDER, WEIGHTS_FOLDER, work_folder
from bitmill.plan.model_plan import make_plan, plan_for_map
from tiny import save_tiny, tinier_llama, tiny_llama, tiny_opt
from tiny_architectures import COVERED, tiny_config

pytestmark = pytest.mark.e2e

TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}


def spec(**changes):
    base = {
        "code": "trellis",
        "budget": {"bits": 3.3},
        "calibration": {"text": TEXT, "sequences": 4, "length": 64, "held_out": 2},
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": 64},
        "threads": 1,
    }
    return parse_config(base | changes)


TUNED = {"method": "omniquant", "omniquant": {"tune_scales_steps": 4, "batch": 2}}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A source, its packed folder, with tuned scales and norms, and the result."""
    folder = tmp_path_factory.mktemp("trellis")
    source = tiny_llama(folder / "source")
    asked = spec(refinement=TUNED)
    return source, folder / "out", run_job(asked, source, folder / "work", folder / "out")


def test_a_job_ends_in_a_folder_of_version_2_within_its_budget(job):
    source, out, result = job
    assert check_folder(out) == result.manifest
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == 2
    row = result.quality.row("knapsack omniquant")
    assert 3.2 < row.bits <= 3.3
    assert row.size == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert row.texts["wiki_evaluation"].kl < 0.05
    widths = BitWidthMap.load(out / "bit_width_map.json")
    assert len({b for groups in widths.linears.values() for b in groups}) > 1
    asked = spec(format=open_checkpoint(out).format.name)
    _, plan = plan_for_map(source, widths, asked)
    assert footprint(plan, widths).size == row.size


def test_tuning_is_reported_and_its_norms_are_packed(job):
    source, out, result = job
    tuning = result.quality.tuning
    assert tuning.steps == 4
    assert tuning.kept == (tuning.kl_after < tuning.kl_before)
    assert not result.quality.blocks
    assert not (out / "learned_parameters.json").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    norms = [name for name in before if name.endswith("layernorm.weight")]
    assert len(norms) == 4
    for name in norms:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]) != tuning.kept


def test_baselines_are_affine_in_bytes_and_widths(job, tmp_path):
    source, _, _ = job
    asked = spec(
        budget={"bits": 7.2},
        allocation={"method": "uniform", "widths": [7], "order": "natural"},
        refinement={"method": "rtn"},
        evaluation={
            "texts": ["wiki_evaluation"],
            "sequences": 1,
            "length": 64,
            "baselines": ["uniform", "embeddings"],
        },
    )
    quality = run_job(asked, source, tmp_path / "work", tmp_path / "out").quality
    result, packed, baseline = quality.rows[1:]
    uniform = BitWidthMap.uniform(admit(source, asked).plan.shapes, 6)
    affine = plan_for_map(source, uniform, parse_config({"budget": {"bits": 8}}))[1]
    counted = footprint(affine, uniform)
    assert baseline.method.startswith("uniform 6-bit")
    assert (baseline.bits, baseline.size) == (counted.bits, counted.size)
    assert packed.method == "uniform rtn, 8-bit embeddings"
    name, plan = "model.embed_tokens", make_plan(source, asked.packs_embeddings)
    widths = BitWidthMap.load(tmp_path / "out" / "bit_width_map.json").linears | {name: (8, 8)}
    counted = footprint(plan, BitWidthMap(linears=widths))
    assert (packed.bits, packed.size) == (counted.bits, counted.size)
    assert packed.size < result.size
    assert packed.texts["wiki_evaluation"].kl == pytest.approx(
        result.texts["wiki_evaluation"].kl, abs=1e-4
    )


def test_the_model_computes_with_the_decoded_weights_and_has_gradients(job):
    _, out, _ = job
    model, plain = bitmill.load(out), bitmill.load(out).dequantize()
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    inputs = model.get_input_embeddings()(ids).detach()
    gradients = []
    for one in (model, plain):
        x = inputs.clone().requires_grad_()
        one(inputs_embeds=x).logits.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-3)


def test_saving_a_loaded_model_keeps_its_bytes(job, tmp_path):
    _, out, _ = job
    bitmill.load(out).save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert again == json.loads((out / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("kind", ["code_bits", "bits", "size"])
def test_every_budget_is_spent_and_never_exceeded(job, kind):
    source, _, _ = job
    plan = plan_for_map(source, BitWidthMap.uniform(admit(source, spec()).plan.shapes, 1), spec())[
        1
    ]
    draw = np.random.default_rng(0)
    linears = tuple(
        LinearProfile(
            one.name,
            one.rows,
            one.columns,
            np.exp2(-2.0 * np.arange(1, 9)) * draw.uniform(0.1, 10, (one.shape.groups, 1)),
        )
        for one in plan.linears
    )
    profile = SensitivityProfile(ProfileOrigin(ProfileConfig()), tuple(range(1, 9)), linears)
    order = {"allocation": {"order": "natural"}}
    least, most = (
        getattr(footprint(plan, BitWidthMap.uniform(plan.shapes, width)), kind) for width in (1, 8)
    )
    used = set()
    for share in (0.02, 0.3, 0.6, 0.97):
        limit = least + share * (most - least)
        budget = int(limit) if kind == "size" else limit
        found = allocate(plan, spec(budget={kind: budget}, **order), profile)
        spent = getattr(footprint(plan, found), kind)
        assert 0.97 * limit - 200 * (kind == "size") < spent <= limit
        used |= {width for groups in found.linears.values() for width in groups}
    assert used == set(range(1, 9))


def test_sba_swaps_rates_of_groups_about_its_base(tmp_path):
    source = tiny_llama(tmp_path / "source", hidden_size=64, head_dim=16, intermediate_size=512)
    stored = load_file(source / "model.safetensors")
    gate, up = (stored[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    gate[:200], up[:200] = 4 * gate[:200], 4 * up[:200]
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    asked = spec(budget={"code_bits": 7}, allocation={"method": "sba", "embeddings": "quantize"})
    result = run_job(asked, source, tmp_path / "work", tmp_path / "out")
    widths = BitWidthMap.load(tmp_path / "out" / "bit_width_map.json").linears
    assert widths["model.layers.0.mlp.down_proj"] in ((8, 8, 6, 6), (8, 7, 7, 6))
    assert widths["model.layers.0.self_attn.q_proj"] == (7,)
    assert widths["model.embed_tokens"] == (6,)
    row = result.quality.row("sba gptq")
    assert row.code_bits <= 7
    assert row.texts["wiki_evaluation"].kl < 0.05


def test_a_map_without_profile_on_a_model_with_biases(tmp_path):
    source = tiny_opt(tmp_path / "source")
    asked = spec(
        budget={"code_bits": 4},
        allocation={"method": "uniform", "order": "natural"},
        refinement={"method": "rtn"},
    )
    result = run_job(asked, source, tmp_path / "work", tmp_path / "out")
    row = result.quality.row("uniform rtn")
    assert row.code_bits == 4
    assert row.texts["wiki_evaluation"].kl < 0.05


@pytest.mark.parametrize("model_type", ["mixtral", "gpt2"])
def test_experts_and_transposed_linears_are_packed_verified_and_computed_with(model_type, tmp_path):
    source = save_tiny(tmp_path / "source", tiny_config(model_type))
    asked = spec(budget={"code_bits": 4})
    result = run_job(asked, source, tmp_path / "work", tmp_path / "out")
    count = 2 * COVERED[model_type][1]
    (verified,) = (tmp_path / "work").glob("verify*/verify.json")
    report = json.loads(verified.read_text())
    assert report["linears"] == count
    assert 0 < max(report["forward_error"].values()) < 1e-3
    assert result.quality.row("knapsack gptq").texts["wiki_evaluation"].kl < 0.05
    model, plain = bitmill.load(tmp_path / "out"), bitmill.load(tmp_path / "out").dequantize()
    packed = [name for name, one in model.named_modules() if isinstance(one, TrellisLinear)]
    assert len(packed) == count
    assert not any(isinstance(one, TrellisLinear) for one in plain.modules())
    original = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        found, expected, before = (one(ids).logits for one in (model, plain, original))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert 1e-3 < (found - before).norm() / before.norm() < 0.4


def test_it_is_exported_as_plain_weights_and_refused_by_name_elsewhere(job, tmp_path):
    _, out, _ = job
    bitmill.export(out, "dequantized", out=tmp_path / "plain", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    expected = bitmill.load(out, dtype="float32").dequantize()
    ids = torch.arange(2, 40)[None]
    assert torch.equal(plain(ids).logits, expected(ids).logits)
    others = set(FORMATS.names()) - {"dequantized", "w8a8", open_checkpoint(out).format.name}
    for name in others:
        with pytest.raises(SpecError, match="no place for tensors of kind 'trellis'"):
            bitmill.export(out, name, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_one_backward_pass_serves_profile_and_refinement(tmp_path, monkeypatch):
    source = tiny_llama(tmp_path / "source")
    windows = []

    def recorded(model, tokens, **given):
        windows.append(len(tokens))
        return loss_weights(model, tokens, **given)

    monkeypatch.setattr("bitmill.refinement.model.loss_weights", recorded)
    packed = []
    for name in ("profiled", "given"):
        work, out = tmp_path / f"{name}-work", tmp_path / name
        run_job(spec(), source, work, out, profile_folder=tmp_path / "profiles")
        packed.append((out / "model.safetensors").read_bytes())
        assert not (work / WEIGHTS_FOLDER).exists()
    assert packed[0] == packed[1]
    assert windows == [2, 4, 2]  # held out alone, where the profile's pass was the job's own


@pytest.mark.parametrize("named", [True, False], ids=["named", "beside"])
def test_a_job_goes_on_where_an_earlier_version_left_its_weights(tmp_path, named):
    source, out = tinier_llama(tmp_path / "source"), tmp_path / "out"
    work = tmp_path / "work" if named else beside(out, ".bitmill-work")
    left = work / FORMER_WEIGHTS_FOLDER
    left.mkdir(parents=True)
    (left / "key.json").write_text("{}")
    asked = spec(
        budget={"code_bits": 4},
        allocation={"method": "uniform", "order": "natural"},
        refinement={"method": "rtn"},
    )
    with work_folder(out, work if named else None) as folder:
        assert folder == work
        run_job(asked, source, folder, out)
        assert not left.exists()
