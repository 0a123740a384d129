"""The demo's parts; the demo itself runs in continuous integration and in the README's command."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitmill.errors import InputError
from bitmill_service.cli.demo import DemoSettings, _fresh_folder, demo_spec, find_model
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
    assert (spec.budget.bits, spec.allocation.method) == (3.0, "knapsack")
    assert (spec.refinement.method, spec.evaluation.baselines) == ("gptq", ("uniform",))
    assert spec.calibration.sequences == settings.calibration_sequences
    assert spec.model.file == "model.gguf"


def test_only_an_earlier_result_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "checkpoint"
    assert _fresh_folder(folder) == folder
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(InputError, match="no earlier result"):
        _fresh_folder(folder)
    assert (folder / "precious").exists()
    (folder / "MANIFEST.json").touch()
    _fresh_folder(folder)
    assert not folder.exists()


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
                "handbook_evaluation": TEXT | {"kl": 0.5, "kl_se": 0.02},
            },
        },
    ]
    print_report(parse_rows(rows))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "method code bits bits file size text tokens perplexity KL",
        "source - - - wiki 4096 20.13 ± 0.50 0",
        "sba gptq 3.000 3.153 97.7 MB wiki 4096 20.13 ± 0.50 0.2500 ± 0.0100",
        "handbook 4096 20.13 ± 0.50 0.5000 ± 0.0200",
    ]
