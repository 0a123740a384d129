"""Whole jobs on tiny models: every method, killed runs, reuse, refusals."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.errors import BudgetError, CalibrationError, Cancelled, ModelError
from bitmill.io.manifest import check_folder
from bitmill.io.targets import may_be_of_result
from bitmill.pipeline.job import run_job
from bitmill.sensitivity.measure import make_profile
from rank_function import in_process
from tiny import tiny_llama, tiny_opt

pytestmark = pytest.mark.e2e


TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}


def spec(**changes):
    base = {
        "budget": {"code_bits": 3},
        "allocation": {"method": "uniform", "order": "natural"},
        "calibration": {"text": TEXT, "sequences": 4, "length": 64, "held_out": 2},
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": 64},
        "threads": 1,
    }
    return parse_config(base | changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def weights_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def stages(events, state):
    return [e.stage for e in events if e.kind == "stage" and e.state == state]


def test_a_job_is_published_whole_and_its_stages_are_skipped_the_second_time(llama, tmp_path):
    events = []
    asked = spec(evaluation=spec().evaluation.model_dump() | {"baselines": ["uniform"]})
    first = run_job(asked, llama, tmp_path / "work", tmp_path / "out", on_progress=events.append)
    assert check_folder(tmp_path / "out") == first.manifest
    assert all(map(may_be_of_result, first.manifest.files))
    assert [row.method for row in first.quality.rows] == [
        "source",
        "uniform gptq",
        "uniform 3-bit gptq",
    ]
    evaluated = [e for e in events if e.stage == "evaluate" and e.kind == "progress"]
    counts = [e.done for e in evaluated]
    assert counts == sorted(counts)
    assert {(e.total, e.unit) for e in evaluated} == {(counts[-1], "step")}
    assert {e.message.partition(" on ")[0] for e in evaluated} >= {
        "uniform 3-bit baseline",
        "uniform 3-bit gptq",
        "source",
    }
    ours = first.quality.row("uniform gptq")
    on_disk = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert (ours.code_bits, ours.size) == (3.0, on_disk)
    assert 0 < ours.texts["wiki_evaluation"].kl < 1
    assert ours.texts["wiki_evaluation"].tokens == 128
    assert len(stages(events, "finished")) == 8
    bytes_before = weights_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    events.clear()
    run_job(asked, llama, tmp_path / "work", tmp_path / "out", on_progress=events.append)
    assert stages(events, "finished") == ["publish"]
    assert weights_of(tmp_path / "out") == bytes_before


@pytest.fixture(scope="module")
def sba_job(llama, tmp_path_factory):
    """A finished job with its profile store: specification, profiles, output, result."""
    folder = tmp_path_factory.mktemp("sba")
    asked = spec(allocation={"method": "sba", "order": "activation"})
    result = run_job(
        asked, llama, folder / "work", folder / "out", profile_folder=folder / "profiles"
    )
    return asked, folder / "profiles", folder / "out", result


def test_a_profile_is_made_once_and_gives_the_same_bytes_again(llama, sba_job, tmp_path):
    asked, profiles, output, first = sba_job
    assert first.quality.row("sba gptq").code_bits <= 3
    assert [path.name for path in profiles.iterdir()] == [first.profile_id]
    (made,) = profiles.glob("*/profile.npz")
    stamp = made.stat().st_mtime_ns
    events = []
    second = run_job(
        asked,
        llama,
        tmp_path / "work",
        tmp_path / "out",
        profile_folder=profiles,
        on_progress=events.append,
    )
    assert second.profile_id == first.profile_id
    assert made.stat().st_mtime_ns == stamp
    assert not [e for e in events if e.stage == "profile" and e.kind == "progress"]
    assert weights_of(output) == weights_of(tmp_path / "out")


def test_the_profile_is_measured_on_the_first_windows_where_asked(llama, tmp_path, monkeypatch):
    seen = []

    def observed(model, tokens, *arguments, **options):
        seen.append(tuple(tokens.shape))
        return make_profile(model, tokens, *arguments, **options)

    monkeypatch.setattr("bitmill.pipeline.stages.profile.make_profile", observed)
    calibration = spec().calibration.model_dump() | {"profile_sequences": 2}
    asked = spec(allocation={"method": "uniform", "order": "activation"}, calibration=calibration)
    result = run_job(asked, llama, tmp_path / "work", tmp_path / "out")
    assert seen == [(2, 64)]
    assert result.quality.row("uniform gptq").code_bits == 3.0


def test_knapsack_meets_a_budget_of_true_bits(llama, tmp_path):
    asked = spec(allocation={"method": "knapsack", "order": "activation"}, budget={"bits": 3.4})
    result = run_job(asked, llama, tmp_path / "work", tmp_path / "out")
    row = result.quality.row("knapsack gptq")
    assert 3.3 < row.bits <= 3.4
    assert result.quality.predicted_loss > 0


def test_an_opt_model_keeps_its_biases_and_a_size_budget_in_bytes(tmp_path):
    model = tiny_opt(tmp_path / "model")
    whole = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    asked = spec(budget={"size": whole // 2}, refinement={"method": "rtn"})
    result = run_job(asked, model, tmp_path / "work", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(model / "model.safetensors")
    biases = [name for name in source if name.endswith("fc1.bias")]
    assert len(biases) == 2
    assert all(torch.equal(stored[name], source[name]) for name in biases)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= whole // 2
    assert result.quality.row("uniform rtn").size <= whole // 2


def killed_job(spec, model, work, out, stage):
    def watch(event):
        if event.kind == "progress" and (event.stage, event.done) == (stage, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    asked = QuantizationConfig.model_validate_json(Path(spec).read_text())
    run_job(asked, Path(model), Path(work), Path(out), on_progress=watch)


@pytest.mark.parametrize("stage", ["profile", "refine"])
def test_a_killed_run_goes_on_at_the_next_block_and_gives_the_same_bytes(
    llama, sba_job, tmp_path, stage
):
    asked, _, straight, _ = sba_job
    (tmp_path / "spec.json").write_text(asked.model_dump_json())
    places = (tmp_path / "spec.json", llama, tmp_path / "work", tmp_path / "out")
    killed = in_process(killed_job, *places, stage)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "work" / f".partial-{stage}"
    finished = {p.name: p.stat().st_mtime_ns for p in partial.glob("block-00000*")}
    assert finished
    run_job(asked, llama, tmp_path / "work", tmp_path / "out")
    folder = tmp_path / "work" / stage
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert weights_of(tmp_path / "out") == weights_of(straight)


def test_a_stop_request_ends_the_job_without_output(llama, tmp_path):
    events = []
    with pytest.raises(Cancelled):
        run_job(
            spec(),
            llama,
            tmp_path / "work",
            tmp_path / "out",
            on_progress=events.append,
            should_stop=lambda: any(e.stage == "refine" for e in events),
        )
    assert not (tmp_path / "out").exists()


def test_an_impossible_budget_is_refused_before_weights_load(llama, tmp_path):
    with pytest.raises(BudgetError, match="smallest"):
        run_job(spec(budget={"bits": 0.5}), llama, tmp_path / "work", tmp_path / "out")
    assert not (tmp_path / "work").exists()


def test_damaged_weights_and_short_texts_are_refused(llama, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*row 3"):
        run_job(spec(), broken, tmp_path / "work", tmp_path / "out")
    text = tmp_path / "short.txt"
    text.write_text("too short")
    calibration = {"text": {"source": "file", "path": str(text)}, "length": 64}
    with pytest.raises(CalibrationError, match="9 tokens"):
        run_job(spec(calibration=calibration), llama, tmp_path / "w2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_windows_of_evaluation_that_cannot_be_are_refused_before_the_work(llama, tmp_path):
    events = []
    evaluation = spec().evaluation.model_dump() | {"framing": "chat"}
    with pytest.raises(CalibrationError, match="no chat template"):
        run_job(
            spec(evaluation=evaluation),
            llama,
            tmp_path / "work",
            tmp_path / "out",
            on_progress=events.append,
        )
    assert stages(events, "finished") == ["resolve", "plan"]


@pytest.mark.parametrize("narrow", [True, False])
def test_a_job_that_learns_a_narrow_text_warns_of_overfitting(llama, tmp_path, narrow):
    text = TEXT
    if narrow:
        (tmp_path / "narrow.txt").write_text("ab" * 1000)
        text = {"source": "file", "path": str(tmp_path / "narrow.txt")}
    events = []
    asked = spec(
        budget={"code_bits": 2},
        refinement={"method": "omniquant", "omniquant": {"epochs": 12, "batch": 2}},
        calibration={"text": text, "sequences": 16, "length": 64, "held_out": 4},
    )
    result = run_job(asked, llama, tmp_path / "work", tmp_path / "out", on_progress=events.append)
    assert all(block.kept == "learned" for block in result.quality.blocks)
    warned = [text for text in ("wiki_evaluation", "handbook_evaluation") if narrow]
    for text, warning in zip(warned, result.quality.warnings, strict=True):
        assert f"{text} by " in warning
    told = [event.message for event in events if event.kind == "warning"]
    assert told == list(result.quality.warnings)


def test_learned_blocks_and_tuned_scales_are_what_is_packed(llama, tmp_path):
    learning = {"mode": "rounding", "epochs": 2, "batch": 2, "tune_scales_steps": 4}
    asked = spec(refinement={"method": "omniquant", "omniquant": learning})
    result = run_job(asked, llama, tmp_path / "work", tmp_path / "out")
    assert [block.index for block in result.quality.blocks] == [0, 1]
    for block in result.quality.blocks:
        assert block.loss_after < block.loss_before or block.kept == "start"
        assert block.texts.keys() == {"wiki_evaluation", "handbook_evaluation"}
    assert not any(linear.asymmetric for linear in result.quality.linears)
    tuning = result.quality.tuning
    assert tuning.steps == 4
    assert tuning.texts.keys() == {"wiki_evaluation", "handbook_evaluation"}
    before = tmp_path / "work" / "refine" / "block-00001.safetensors"
    tuned = tmp_path / "work" / "refine" / "tuned" / "block-00001.safetensors"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(tuned)
    name = "model.layers.1.mlp.up_proj.scales"
    assert torch.equal(stored[name], expected[name])
    assert torch.equal(load_file(before)[name], expected[name]) != tuning.kept
