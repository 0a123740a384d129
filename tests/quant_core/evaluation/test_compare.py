"""Rows of a report: measured losses against direct ones, predictions, and what is published."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.allocation.profile import SensitivityProfile
from bitmill.calibration.windows import evaluation_tokens, evaluation_windows
from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.quantization import Evaluation, parse_config
from bitmill.evaluation.compare import Candidate, measure, measure_tasks
from bitmill.evaluation.count import Count, windows_read
from bitmill.evaluation.logits import StreamedLogits
from bitmill.inference.load import load
from bitmill.io.manifest import read_manifest
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.job import Result, run_job
from bitmill.pipeline.stages.allocate import LEFT_BY_REFINEMENT
from bitmill.plan.model_plan import plan_for_map
from bitmill.reporting.html import write_report
from bitmill.reporting.summary import ProfileSummary
from bitmill.results import QualityReport
from tiny import CALIBRATION, tiny_llama

TEXTS = Path(bitmill.__file__).parent / "texts"
WIKI = "wiki_evaluation"
EVALUATION: dict[str, Any] = {"texts": [WIKI], "sequences": 3, "length": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def job(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A knapsack job with two baselines; its stages lie in `work` beside its output."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "text.txt").write_text((TEXTS / "wiki_calibration.txt").read_text()[:4000])
    text = {"source": "file", "path": str(folder / "text.txt")}
    spec = parse_config(
        {
            "budget": {"code_bits": 3.2},
            "allocation": {"widths": [2, 3, 4]},
            "refinement": {"compensated_grid": False, "asymmetric": False},
            "calibration": {"text": text, "sequences": 4, "length": 64, "held_out": 2},
            "evaluation": EVALUATION
            | {"baselines": ["uniform", "uniform-2", "uniform-3", "embeddings", "cache-2"]},
            "threads": 1,
        }
    )
    return run_job(spec, source, folder / "work", folder / "out")


def mean_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(float(model(row[None], labels=row[None]).loss) for row in tokens) / len(tokens)


def test_the_measured_increase_is_that_of_the_loaded_models(source: Path, job: Result) -> None:
    tokens = evaluation_tokens(WIKI, source, length=64, sequences=3)
    before = mean_loss(AutoModelForCausalLM.from_pretrained(source), tokens)
    after = mean_loss(load(job.folder), tokens)
    found = job.quality.row("knapsack gptq").texts[WIKI]
    assert found.loss_increase == pytest.approx(after - before, abs=2e-5)
    ratio = found.perplexity / job.quality.row("source").texts[WIKI].perplexity
    assert found.loss_increase == pytest.approx(math.log(ratio), abs=1e-9)
    assert 0 < found.loss_increase_se < found.perplexity_se / found.perplexity
    assert job.quality.row("source").texts[WIKI].loss_increase == 0


def test_rows_carry_the_profile_s_prediction_of_their_widths(job: Result) -> None:
    """Times what refinement leaves of the map's measured loss over the predicted one, where these
    are far apart."""
    rows = {row.method: row for row in job.quality.rows}
    assert list(rows) == [
        "source",
        "knapsack gptq",
        "knapsack gptq, 8-bit embeddings",
        "knapsack gptq, 2-bit cache",
        "uniform 2-bit gptq",
        "uniform 3-bit gptq",
    ]
    profile = SensitivityProfile.load(job.folder.parent / "work" / "profile" / "profile.npz")
    (taken,) = [check for check in job.quality.checks if check.taken]
    found = LEFT_BY_REFINEMENT * taken.kl / taken.predicted_loss
    factor = 1 if 1 / 1.5 <= found <= 1.5 else found
    assert any("predicted losses" in note for note in job.quality.warnings) == (factor != 1)
    for width in (2, 3):
        same = {linear.name: (width,) * linear.shape.groups for linear in profile.linears}
        row = rows[f"uniform {width}-bit gptq"]
        assert row.predicted_loss == pytest.approx(factor * profile.predicted_loss(same))
    assert rows["source"].predicted_loss is None
    assert rows["knapsack gptq, 2-bit cache"].predicted_loss is None
    assert rows["knapsack gptq, 2-bit cache"].texts[WIKI].kl > rows["knapsack gptq"].texts[WIKI].kl
    assert rows["knapsack gptq"].predicted_loss == job.quality.predicted_loss
    assert 0 < rows["knapsack gptq"].predicted_loss < rows["uniform 3-bit gptq"].predicted_loss


def test_the_row_with_packed_embeddings_is_what_a_job_would_make(
    source: Path, job: Result, tmp_path: Path
) -> None:
    """The same map, with the embedding at 8 bits in it."""
    row = job.quality.row("knapsack gptq, 8-bit embeddings")
    widths = BitWidthMap.load(job.folder / MAP_NAME)
    linears = widths.linears | {"model.embed_tokens": (8, 8)}
    given = widths.model_copy(update={"linears": linears}).to_json()
    spec = parse_config(
        {
            "budget": {"bits": 16},
            "allocation": {
                "method": "map",
                "map": json.loads(given),
                "order": widths.order,
                "embeddings": "quantize",
            },
            "calibration": {
                "text": {"source": "file", "path": str(CALIBRATION)},
                "sequences": 1,
                "length": 64,
                "held_out": 0,
            },
            "evaluation": EVALUATION,
            "refinement": {"method": "rtn"},
            "threads": 1,
        }
    )
    made = run_job(spec, source, tmp_path / "work", tmp_path / "out")
    assert row.size == made.quality.rows[1].size
    plain = job.quality.row("knapsack gptq")
    assert row.texts[WIKI].kl != plain.texts[WIKI].kl
    assert row.texts[WIKI].kl == pytest.approx(plain.texts[WIKI].kl, rel=0.2)
    assert row.size < plain.size


def test_a_map_outside_the_profile_has_no_prediction(source: Path) -> None:
    _, plan = plan_for_map(source, BitWidthMap(linears={"model.layers.0.mlp.up_proj": (3, 3)}))
    model = StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)
    asked = Evaluation.model_validate(EVALUATION | {"sequences": 1})
    same = BitWidthMap(linears={"model.layers.0.mlp.up_proj": (3, 3)})
    windows = evaluation_windows(asked, source)
    rows = measure(
        model,
        windows,
        {"same": Candidate(same, StreamedLogits(model), plan)},
        Count(lambda *_: None, 1),
    )
    assert (rows[1].predicted_loss, rows[1].code_bits) == (None, 3.0)
    assert rows[1].texts[WIKI].loss_increase == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("is_known", [False, True])
def test_progress_moves_with_the_blocks_over_all_texts_and_models(
    source: Path, is_known: bool
) -> None:
    same = BitWidthMap(linears={"model.layers.0.mlp.up_proj": (3, 3)})
    _, plan = plan_for_map(source, same)
    model = StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)
    sizes = {"a": 6, "b": 3}
    texts = {name: torch.arange(size * 8).reshape(size, 8) % 50 for name, size in sizes.items()}
    outputs = {name: StreamedLogits(model).last_block(text) for name, text in texts.items()}
    candidates = {name: Candidate(same, StreamedLogits(model), plan) for name in ("one", "two")}
    told: list[tuple[int, int, str, str]] = []
    passes = [] if is_known else ["source"]
    count = Count(lambda *now: told.append(now), windows_read(texts, len(passes) + 2))
    measure(model, texts, candidates, count, known=outputs if is_known else None)
    blocks = model.block_count
    assert {now[1:3] for now in told} == {((len(passes) + 2) * 9, "window")}
    counts = [now[0] for now in told]
    assert counts == sorted(counts)
    assert counts[-1] == told[-1][1]
    before = 0
    for text, size in sizes.items():
        for name in (*passes, "one", "two"):
            steps = blocks if name == "source" else blocks + 1
            compared = 0 if name == "source" else size
            expected = [size * i // steps for i in range(1, blocks + 1)] + [
                (size * blocks + i) // steps for i in range(1, compared + 1)
            ]
            of_pass = [now[0] - before for now in told if now[3] == f"{name} on {text}"]
            assert of_pass == expected
            before += size


class Suite:
    """Tasks without a harness."""

    def measure(self, model: Any, tokenizer: Any, *, on_task: Any, **_: Any) -> dict[str, Any]:
        for name in ("piqa", "boolq"):
            on_task(name)
        return {}


def test_tasks_are_counted_behind_the_windows(source: Path, job: Result) -> None:
    told: list[tuple[int, int, str, str]] = []
    count = Count(lambda *now: told.append(now), 9, "step")
    count.part(5, "windows")(5, 5)
    measure_tasks(
        Suite(),
        [],
        {"source": source, "packed": job.folder},
        packed="packed",
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
        chat=False,
        count=count,
    )
    assert [(done, message) for done, _, _, message in told[1:]] == [
        (6, "piqa of source"),
        (7, "boolq of source"),
        (8, "piqa of packed"),
        (9, "boolq of packed"),
    ]


def test_the_published_folder_reports_its_profile(job: Result, tmp_path: Path) -> None:
    assert "profile_summary.json" in read_manifest(job.folder).files
    summary = ProfileSummary.load(job.folder / "profile_summary.json")
    total = sum(linear.predicted_loss for linear in summary.linears.values())
    assert total == pytest.approx(job.quality.predicted_loss, rel=1e-3)
    assert QualityReport.load(job.folder / "quality.json") == job.quality
    write_report(job.folder, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    headings = ("Sensitivity", "Size against loss", "Predicted against measured loss")
    for heading in (*headings, "Maps on held-out windows"):
        assert f"<h2>{heading}</h2>" in html
