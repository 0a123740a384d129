"""Options of a specification: every field can be set, by the same options in every command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.errors import InputError
from bitmill.formats.export_plan import ExportTarget
from bitmill_service.cli.docs import commands
from bitmill_service.cli.main import app
from bitmill_service.cli.options import COMMON, GROUPS, JOB, SERVICE_RESULTS, SpecFile, takes
from bitmill_service.cli.spec import Given, build_spec, model_reference
from bitmill_workers.job_spec import JobSpec
from finished import MAP

CONSTANT = "schema_version"
WHOLE = (BitWidthMap, ExportTarget)
"""What one option gives whole."""
OWN = {"--out", "--work", "--profiles", "--task-folder", "--device", "--spec", "--json", "--help"}
"""Options of `quantize` that set no field of a specification."""

CASES: list[tuple[str, dict[str, Any]]] = [
    (
        "org/name@v2 --file m.gguf --bits 3 --label a --deadline 60 --seed 3 --threads 2 "
        "--devices 4 --code affine --format plain",
        {
            "code": "affine",
            "format": "plain",
            "model.source": "hub",
            "model.repo_id": "org/name",
            "model.revision": "v2",
            "model.file": "m.gguf",
            "budget.bits": 3.0,
            "label": "a",
            "deadline_s": 60,
            "seed": 3,
            "threads": 2,
            "devices": 4,
        },
    ),
    (
        "path:models/x --code-bits 2.5 --method sba --widths 2,3,5 --order natural "
        "--fuse-siblings --per-linear --keep '*.o_proj, *.q_proj' --embeddings quantize "
        "--min-bits 2 --max-bits 5 --edge-min-bits 4",
        {
            "model.source": "path",
            "model.path": "models/x",
            "budget.code_bits": 2.5,
            "allocation.method": "sba",
            "allocation.widths": [2, 3, 5],
            "allocation.order": "natural",
            "allocation.fuse_siblings": True,
            "allocation.per_linear": True,
            "allocation.keep": ["*.o_proj", "*.q_proj"],
            "allocation.embeddings": "quantize",
            "allocation.min_bits": 2,
            "allocation.max_bits": 5,
            "allocation.edge_min_bits": 4,
        },
    ),
    (
        "upload:u1 --size 120MB --no-clip-search --no-compensated-grid --no-scale-refit "
        "--no-asymmetric --refine-settings {} --transforms [] --outliers 1,4",
        {
            "model.source": "upload",
            "model.upload_id": "u1",
            "budget.size": 120_000_000,
            "allocation.outliers": [1, 4],
            "refinement.clip_search": False,
            "refinement.compensated_grid": False,
            "refinement.scale_refit": False,
            "refinement.asymmetric": False,
        },
    ),
    (
        "hub:org/name --bits 3 --refine omniquant --learn scales --epochs 3 --batch 2 "
        "--augmented-loss --tune-scales-steps 10 --resume-parameters j1",
        {
            "refinement.method": "omniquant",
            "refinement.omniquant.mode": "scales",
            "refinement.omniquant.epochs": 3,
            "refinement.omniquant.batch": 2,
            "refinement.omniquant.augmented_loss": True,
            "refinement.omniquant.tune_scales_steps": 10,
            "refinement.omniquant.resume_parameters.source": "job",
            "refinement.omniquant.resume_parameters.job_id": "j1",
        },
    ),
    (
        "m --bits 3 --refine omniquant --resume-parameters path:models/first",
        {
            "refinement.omniquant.resume_parameters.source": "path",
            "refinement.omniquant.resume_parameters.path": "models/first",
        },
    ),
    (
        "m --bits 3 --refine omniquant --resume-parameters upload:u1",
        {
            "refinement.omniquant.resume_parameters.source": "upload",
            "refinement.omniquant.resume_parameters.upload_id": "u1",
        },
    ),
    (
        "m --bits 3 --calibration-text dataset:org/set --calibration-config en "
        "--calibration-split test --calibration-field body --calibration-sequences 5 "
        "--calibration-length 64 --held-out 2 --held-out-text mixture_calibration "
        "--profile-sequences 4",
        {
            "calibration.text.source": "dataset",
            "calibration.text.name": "org/set",
            "calibration.text.config": "en",
            "calibration.text.split": "test",
            "calibration.text.field": "body",
            "calibration.sequences": 5,
            "calibration.length": 64,
            "calibration.held_out": 2,
            "calibration.held_out_text": "mixture_calibration",
            "calibration.profile_sequences": 4,
        },
    ),
    (
        "m --bits 3 --calibration-text models/t.jsonl --calibration-field body",
        {
            "calibration.text.source": "file",
            "calibration.text.path": "models/t.jsonl",
            "calibration.text.field": "body",
        },
    ),
    (
        "m --memory 8GB --context 4096 --cache-batch 4 --cache-dtype fp8 --effort best "
        "--kept-dtype source",
        {
            "budget.memory": 8_000_000_000,
            "budget.context": 4096,
            "budget.batch": 4,
            "budget.cache_dtype": "fp8",
            "effort": "best",
            "allocation.kept_dtype": "source",
        },
    ),
    (
        "m --bits 3 --code trellis --effort best",
        {
            "code": "trellis",
            "format": "bitmill-2",
            "allocation.widths": [1, 2, 3, 4, 5, 6, 7, 8],
            "effort": "best",
            "refinement.method": "omniquant",
            "refinement.omniquant.tune_scales_steps": 100,
            "calibration.sequences": 160,
        },
    ),
    (
        "m --bits 3 --exports gguf,dequantized",
        {
            "exports": [
                {"format": "gguf", "settings": {}},
                {"format": "dequantized", "settings": {}},
            ],
            "allocation.order": "natural",
            "allocation.widths": [2, 3, 4, 5, 6],
        },
    ),
    (
        'm --bits 3 --exports \'[{"format": "gptq", "settings": {"symmetric": true}}]\'',
        {
            "exports": [{"format": "gptq", "settings": {"symmetric": True}}],
            "allocation.widths": [2, 3, 4, 5, 6],
        },
    ),
    ("m --max-loss 0.05", {"budget.max_loss_increase": 0.05}),
    (
        "m --bits 3 --calibration-text bundled:mixture_calibration --calibration-framing chat "
        "--evaluation-framing none --check maps",
        {
            "calibration.text.source": "bundled",
            "calibration.text.name": "mixture_calibration",
            "calibration.framing": "chat",
            "evaluation.framing": "none",
            "allocation.check": "maps",
        },
    ),
    (
        "m --bits 3 --evaluation-texts handbook_evaluation --evaluation-sequences 3 "
        "--evaluation-length 64 --baselines uniform,uniform-3 --tasks piqa,arc_easy",
        {
            "evaluation.texts": ["handbook_evaluation"],
            "evaluation.sequences": 3,
            "evaluation.length": 64,
            "evaluation.baselines": ["uniform", "uniform-3"],
            "evaluation.tasks": ["piqa", "arc_easy"],
        },
    ),
    (
        "m --bits 3 --method map --map MAP.json",
        {"allocation.map.source": "inline", "allocation.map.map": MAP},
    ),
    (
        "m --bits 3 --method map --map job:j1",
        {"allocation.map.source": "job", "allocation.map.job_id": "j1"},
    ),
    (
        "m --bits 3 --method map --map upload:u1",
        {"allocation.map.source": "upload", "allocation.map.map_id": "u1"},
    ),
]


def leaves(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Paths of all fields that hold no further fields; some are one value."""
    for name, field in model.model_fields.items():
        inner = [k for k in kinds(field.annotation) if k not in WHOLE and is_model(k)]
        if not inner:
            yield above + name
        for kind in inner:
            yield from leaves(kind, f"{above}{name}.")


def kinds(annotation: Any) -> Iterator[Any]:
    """Every type named in an annotation."""
    yield annotation
    for argument in get_args(annotation):
        yield from kinds(argument)


def is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def at(spec: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        spec = spec[name]
    return spec


def options(name: str) -> set[str]:
    """The long names of a command's options."""
    command = next(command for path, command in commands() if path == [name])
    return {
        option
        for parameter in command.get_params(typer.Context(command))
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }


@pytest.fixture
def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The specification of a line of `submit`'s arguments and options, as JSON values."""
    (tmp_path / "MAP.json").write_text(json.dumps(MAP))
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()

    @app.command()
    @takes(*COMMON, SERVICE_RESULTS, JOB)
    def show(
        model: Annotated[str | None, typer.Argument()] = None,
        *,
        given: Given,
        spec: SpecFile = None,
    ) -> None:
        found = build_spec(None if model is None else model_reference(model), spec, given)
        typer.echo(found.model_dump_json())

    def parse(line: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, shlex.split(line), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.output)
        return found

    return parse


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_an_option_sets_its_field(parsed: Any, line: str, expected: dict[str, Any]) -> None:
    spec = parsed(line)
    assert {path: at(spec, path) for path in expected} == expected


def test_every_field_is_set_by_some_option() -> None:
    tried = {path for _, expected in CASES for path in expected}
    assert tried == set(leaves(JobSpec)) - {
        CONSTANT,
        "refinement.settings",
        "refinement.transforms",
    }


@pytest.mark.parametrize(
    ("given", "problem"),
    [('{"rounds": 2}', "rounds"), ("[1]", "no JSON object"), ("{", "no JSON")],
)
def test_settings_of_a_method_reach_the_specification(given: str, problem: str) -> None:
    line = ["submit", "m", "--bits", "3", "--refine-settings", given, "--url", "http://127.0.0.1:9"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code != 0
    assert problem in f"{done.output}{done.exception}"


def test_the_lines_above_use_every_option_of_submit() -> None:
    used = {word for line, _ in CASES for word in shlex.split(line) if word.startswith("--")}
    offered = {o.name for group in (*COMMON, SERVICE_RESULTS, JOB) for o in GROUPS[group]}
    assert {word.replace("--no-", "--") for word in used} == offered
    assert used <= options("submit")


def test_quantize_and_submit_take_the_same_options_of_a_specification() -> None:
    job = {option.name for option in GROUPS[JOB]}
    offered = {o for o in options("submit") if o.replace("--no-", "--") in _fields()}
    assert options("quantize") - OWN == offered - job


def _fields() -> set[str]:
    return {option.name for group in GROUPS.values() for option in group}


def test_options_go_over_the_file_and_replace_references_whole(parsed: Any, tmp_path: Path) -> None:
    given = {
        "model": {"source": "path", "path": "models/old", "file": "old.gguf"},
        "budget": {"code_bits": 3},
        "calibration": {"text": {"source": "file", "path": "models/t.txt"}, "sequences": 9},
        "seed": 5,
    }
    (tmp_path / "spec.json").write_text(json.dumps(given))
    spec = parsed("org/new --spec spec.json --bits 4 --calibration-text dataset:set --held-out 1")
    assert spec["model"] == {
        "source": "hub",
        "repo_id": "org/new",
        "revision": "main",
        "file": None,
    }
    assert (spec["budget"]["code_bits"], spec["budget"]["bits"]) == (None, 4.0)
    assert spec["calibration"]["text"]["name"] == "set"
    assert (spec["calibration"]["sequences"], spec["calibration"]["held_out"]) == (9, 1)
    assert spec["seed"] == 5
    kept = parsed("--spec spec.json --calibration-field body")
    assert kept["calibration"]["text"] == given["calibration"]["text"] | {"field": "body"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--bits 3", "name the model"),
        ("m", "give one of --bits"),
        ("m --spec empty.json", "give one of --bits"),
        ("m --bits 3 --size 1GB", "exactly one of code_bits, bits, size"),
        ("m --size huge", "'huge' is no size"),
        ("m --bits 3 --calibration-split test", "--calibration-text"),
        ("m --bits 3 --widths 2,x", "allocation.widths.1"),
        ("m --bits 3 --widths 7", r"widths \[7\]"),
        ("m --bits 3 --held-out -1", "calibration.held_out"),
        ("m --bits 3 --exports nowhere", "exports.0: .*'nowhere' is unknown"),
        ("m --bits 3 --exports [1", "no JSON"),
        (
            'm --bits 3 --exports \'[{"format": "gptq", "settings": {"x": 1}}]\'',
            "gptq' has no setting 'x', given as 1",
        ),
        ("m --bits 3 --resume-parameters j", "give method 'omniquant'"),
        ("m --bits 3 --map job:j1", "method 'knapsack' with map given"),
        ("m --bits 3 --method map --map nowhere.json", "nowhere.json"),
        ("m --bits 3 --spec nowhere.json", "nowhere.json cannot be read"),
        ("m --bits 3 --spec list.json", "list.json holds no JSON object"),
        ("m --bits 3 --held-out 1 --spec odd.json", "calibration must be an object"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    parsed: Any, tmp_path: Path, line: str, problem: str
) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "empty.json").write_text('{"budget": {}}')
    (tmp_path / "odd.json").write_text('{"calibration": 5}')
    with pytest.raises(InputError, match=problem):
        parsed(line)
