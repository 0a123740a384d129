"""The demo's parts; the demo itself runs in continuous integration and in the README's command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.errors import InputError
from bitmill.io.manifest import write_manifest
from bitmill.reporting.picture import map_svg
from bitmill_service.cli.demo import (
    CHECKPOINT,
    FILES,
    PICTURE,
    REPORT,
    DemoSettings,
    check_place,
    demo_spec,
    find_model,
)
from bitmill_service.cli.report_table import parse_rows, print_report

TEXT = {"windows": 8, "tokens": 4096, "perplexity": 20.126, "perplexity_se": 0.5}


def test_model_is_found_by_what_the_folder_holds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        find_model(tmp_path)
    (tmp_path / "model.Q4_1.gguf").touch()
    assert find_model(tmp_path) == (tmp_path, "model.Q4_1.gguf")
    (tmp_path / "model.safetensors").touch()
    assert find_model(tmp_path) == (tmp_path, None)
    with pytest.raises(InputError, match="no folder"):
        find_model(tmp_path / "none")


def test_job_is_the_main_one_at_the_stated_size(tmp_path: Path) -> None:
    settings = DemoSettings(out=tmp_path)
    spec = demo_spec(settings, "model.gguf")
    assert spec.code_name == "affine"
    assert demo_spec(replace(settings, code="trellis"), None).code_name == "trellis"
    assert (spec.budget.kind, spec.budget.value) == ("max_loss_increase", settings.max_loss)
    assert spec.allocation.method == "knapsack"
    assert (spec.refinement.method, spec.evaluation.baselines) == ("gptq", ("uniform",))
    assert spec.calibration.sequences == settings.calibration_sequences
    assert spec.model.file == "model.gguf"


def earlier(out: Path) -> None:
    """What a finished demo leaves."""
    (out / CHECKPOINT).mkdir(parents=True)
    (out / CHECKPOINT / "config.json").write_text("{}")
    write_manifest(out / CHECKPOINT)
    found = BitWidthMap(linears={"a": (3,)})
    (out / MAP_NAME).write_text(found.to_json())
    (out / PICTURE).write_text(map_svg(found))
    (out / REPORT).write_text('<meta name="generator" content="Bitmill">')


@pytest.mark.parametrize(
    "mine",
    [
        "thesis.txt",
        "photos/cat.jpg",
        "checkpoint/notes.txt",
        "checkpoint/deep/notes.txt",
        ".hidden",
        "bit_width_map.json",
        "bit_width_map.json/mine",
        "bit_width_map.svg",
        "report.html",
        "report.html/mine",
    ],
)
@pytest.mark.parametrize("after", [False, True], ids=["first", "again"])
def test_only_an_earlier_result_is_replaced(tmp_path: Path, mine: str, after: bool) -> None:
    settings, model = DemoSettings(out=tmp_path / "out"), tmp_path / "model"
    check_place(settings, model)
    if after:
        earlier(settings.out)
        check_place(settings, model)
        for name in FILES:
            (settings.out / name).unlink()
    file = settings.out / mine
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("years of work")
    with pytest.raises(InputError, match=mine.split("/")[0]) as refused:
        check_place(settings, model)
    assert refused.value.code == "output_exists"
    assert file.read_text() == "years of work"


def test_the_demo_writes_neither_into_its_model_nor_onto_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(model)
    for out in (model, model / "below", tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(InputError):
            check_place(DemoSettings(out=out), model)
    with pytest.raises(InputError, match="the data"):
        check_place(DemoSettings(out=tmp_path / "o", data=tmp_path / "o" / "data"), model)


def test_table_names_methods_bits_size_tokens_and_quality(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {"method": "source", "texts": {"wiki_evaluation": TEXT}},
        {
            "method": "sba gptq",
            "code_bits": 3.0,
            "bits": 3.1526,
            "size": 97_650_000,
            "texts": {
                "wiki_evaluation": TEXT | {"kl": 0.25, "kl_se": 0.01},
                "handbook_evaluation": TEXT | {"kl": 0.5, "kl_se": 0.0, "perplexity_se": 0.0},
            },
        },
    ]
    print_report(parse_rows(rows))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "method code bits bits file size text tokens perplexity KL",
        "source - - - wiki 4096 20.13 ± 0.50 0",
        "sba gptq 3.000 3.153 97.7 MB wiki 4096 20.13 ± 0.50 0.2500 ± 0.0100",
        "handbook 4096 20.13 0.5000",  # of one window nobody knows the error
    ]
