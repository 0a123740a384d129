"""Packed folders with something rounded, in a job's report and of a folder made before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import parse_config
from bitmill.errors import SpecError
from bitmill.evaluation.compare import evaluate_folder
from bitmill.pipeline.admission import admit
from bitmill.pipeline.job import Result, run_job
from bitmill.plan.model_plan import make_plan
from tiny import tiny_llama

WIKI = "wiki_evaluation"
TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}
ASKED = [
    *("activations-8", "activations-4", "activations-4-quik", "activations-4-llmint8"),
    *("activations-8-static", "activations-8-absmax", "activations-fp8", "cache-2"),
]
SHORT = {"texts": [WIKI], "sequences": 2, "length": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its norms put out sixteen large channels each."""
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    weights = load_file(folder / "model.safetensors")
    for name, factors in weights.items():
        if name.endswith("layernorm.weight"):
            factors[5::16] *= 12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def job(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder, any_spec = tmp_path_factory.mktemp("job"), parse_config({"budget": {"bits": 16}})
    shapes = make_plan(source, any_spec).shapes
    uniform = BitWidthMap.uniform(shapes, 4)
    kept = uniform.model_copy(
        update={"order": "activation", "outliers": {shape.name: 16 for shape in shapes}}
    )
    spec = parse_config(
        {
            "budget": {"bits": 16},
            "allocation": {
                "method": "map",
                "map": json.loads(kept.to_json()),
                "order": "activation",
            },
            "refinement": {"method": "rtn"},
            "calibration": {"text": TEXT, "sequences": 4, "length": 64, "held_out": 0},
            "evaluation": SHORT | {"baselines": ASKED},
            "threads": 1,
        }
    )
    return run_job(spec, source, folder / "work", folder / "out")


@pytest.mark.e2e
def test_a_report_has_a_row_for_each(job: Result) -> None:
    kl = {row.method: row.texts[WIKI].kl for row in job.quality.rows if row.method != "source"}
    plain = kl.pop("map rtn")
    told = {name.removeprefix("map rtn, "): value for name, value in kl.items()}
    assert set(told) == {
        *("8-bit activations", "4-bit activations", "4-bit activations (quik)"),
        *("4-bit activations (llmint8)", "8-bit activations (static)"),
        *("8-bit activations (absmax)", "fp8 activations", "2-bit cache"),
    }
    assert told["4-bit activations"] > 4 * told["4-bit activations (quik)"] > plain
    assert told["4-bit activations"] > 4 * told["4-bit activations (llmint8)"]
    assert told["8-bit activations"] < 1.2 * plain
    assert told["8-bit activations"] < told["8-bit activations (static)"] < told["2-bit cache"]
    sizes = {row.size for row in job.quality.rows if row.method != "source"}
    assert len(sizes) == 1


@pytest.mark.e2e
def test_of_a_folder_the_same_is_measured(source: Path, job: Result) -> None:
    names = ("activations-4-quik", "cache-2")
    found = evaluate_folder(
        *(job.folder, source),
        gguf=None,
        texts=(WIKI,),
        sequences=2,
        length=64,
        device="cpu",
        baselines=names,
    )
    assert [row.method for row in found] == [
        *("source", "packed", "packed, 4-bit activations (quik)", "packed, 2-bit cache")
    ]
    for row in found[1:]:
        same = job.quality.row(row.method.replace("packed", "map rtn"))
        assert row.texts[WIKI].kl == pytest.approx(same.texts[WIKI].kl, rel=1e-6)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("activations-8-static", "need calibration windows, which only a job has"),
        ("uniform-3", r"\['uniform-3'\] are quantized by a job"),
        ("activations-3", "'activations-3' is unknown: known are"),
    ],
)
def test_what_only_a_job_can_measure_is_refused(
    source: Path, job: Result, name: str, problem: str
) -> None:
    with pytest.raises(SpecError, match=problem):
        evaluate_folder(
            *(job.folder, source),
            gguf=None,
            texts=(WIKI,),
            sequences=1,
            length=64,
            device="cpu",
            baselines=(name,),
        )


def test_without_a_text_there_is_nothing_to_measure_them_on(source: Path) -> None:
    spec = {"budget": {"bits": 4}, "evaluation": {"texts": [], "baselines": ["cache-8"]}}
    with pytest.raises(
        SpecError, match=r"\['cache-8'\] are measured on evaluation.texts"
    ) as refused:
        admit(source, parse_config(spec))
    assert refused.value.param == "evaluation.baselines"
