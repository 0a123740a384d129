"""lm-evaluation-harness tasks through the command line, on a local task file."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitmill.config.quantization import parse_config
from bitmill.errors import InputError, SpecError
from bitmill.evaluation.tasks import TaskSuite
from bitmill.reporting.html import task_table
from bitmill.results import QualityRow, TaskMetric, TaskQuality
from tiny import byte_tokenizer, tiny_llama

installed = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="the extra `eval` (lm-eval) is not installed"
)

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{before}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


WHOLE_TEXT = """
task: text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1.0
"""


def samples() -> list[dict[str, Any]]:
    """Questions whose answers are of different lengths, so that acc and acc_norm differ."""
    words = ["abc", "de", "fghijkl", "mn", "opqrst", "u", "vwxyz", "hello", "it", "question"]
    return [
        {
            "before": f"{word} is",
            "choices": [word, words[i - 1] * 3, words[i - 2][:1]],
            "answer": i % 3,
        }
        for i, word in enumerate(words)
    ]


def task_folder(folder: Path) -> Path:
    folder.mkdir()
    data = folder / "letters.jsonl"
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples()))
    (folder / "letters.yaml").write_text(TASK.format(file=data))
    return folder


def accuracies(model: Path) -> tuple[float, float]:
    """acc and acc_norm by the formula: argmax of ln p(answer), plain and by length."""
    tokenizer, loaded = byte_tokenizer(), AutoModelForCausalLM.from_pretrained(model).eval()
    right = torch.zeros(2)
    for sample in samples():
        scores = []
        for choice in sample["choices"]:
            text, answer = (tokenizer(t)["input_ids"] for t in (sample["before"], f" {choice}"))
            with torch.no_grad():
                logits = loaded(torch.tensor([text + answer])).logits[0].log_softmax(-1)
            likely = sum(float(logits[len(text) - 1 + i, t]) for i, t in enumerate(answer))
            scores.append((likely, likely / len(choice)))
        best = torch.tensor(scores).argmax(0)
        right += best == sample["answer"]
    return float(right[0]) / len(samples()), float(right[1]) / len(samples())


def bitmill(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "bitmill_service.cli.main", *map(str, arguments)]
    surroundings = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)


@installed
@pytest.mark.slow
def test_a_job_and_evaluate_measure_a_task_of_one_s_own(tmp_path: Path) -> None:
    model, folder = tiny_llama(tmp_path / "model"), task_folder(tmp_path / "tasks")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    tasks = ("--tasks", "letters", "--task-folder", folder)
    windows = ("--evaluation-sequences", 1, "--evaluation-length", 64)
    calibration = ("--calibration-text", text, "--calibration-sequences", 2)
    made = bitmill(
        *("quantize", model, "--code-bits", 4, "--method", "uniform", "--refine", "rtn"),
        *(*calibration, "--calibration-length", 64, "--held-out", 1, *windows, *tasks),
        *("--order", "natural", "--out", tmp_path / "out"),
    )
    assert made.returncode == 0, made.stderr
    rows = json.loads((tmp_path / "out" / "quality.json").read_text())["rows"]
    by_method = {row["method"]: row["tasks"]["letters"] for row in rows}
    assert list(by_method) == ["source", "uniform rtn"]
    acc, acc_norm = accuracies(model)
    source = by_method["source"]
    assert (source["samples"], source["version"]) == (10, "1.0")
    assert source["metrics"]["acc"]["value"] == pytest.approx(acc)
    assert source["metrics"]["acc_norm"]["value"] == pytest.approx(acc_norm)
    spread = (acc * (1 - acc) / 9) ** 0.5
    assert source["metrics"]["acc"]["se"] == pytest.approx(spread, abs=1e-6)
    short = ("--texts", "wiki_evaluation", "--sequences", 1, "--length", 64)
    again = bitmill("evaluate", tmp_path / "out", "--source", model, *short, *tasks, "--json")
    assert again.returncode == 0, again.stderr
    measured = {row["method"]: row["tasks"] for row in json.loads(again.stdout)["rows"]}
    assert measured["packed"]["letters"] == by_method["uniform rtn"]
    for said in (made.stderr, again.stderr):
        counts = re.findall(r"^evaluate: (\d+)/(\d+) step", said, re.MULTILINE)
        done, totals = [int(one) for one, _ in counts], {int(total) for _, total in counts}
        assert done == sorted(done)
        assert totals == {done[-1]}


@installed
def test_likelihoods_of_a_bfloat16_model_are_added_in_float32(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 4
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "text.yaml").write_text(WHOLE_TEXT.format(file=data))
    folder = tiny_llama(tmp_path / "model", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = byte_tokenizer()

    suite = TaskSuite(["text"], tmp_path / "tasks")
    found = suite.measure(model, tokenizer, on_task=lambda *_: None)["text"]

    tokens = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[0, *tokens[:-1]]])).logits[0]
    likely = logits.double().log_softmax(-1)[range(len(tokens)), tokens].sum()
    bits = float(-likely) / math.log(2) / len(text)
    assert found.metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)


@installed
def test_unknown_tasks_and_unreachable_data_are_refused(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks")
    (folder / "letters.jsonl").unlink()
    with pytest.raises(InputError, match="'letters' cannot be had") as refused:
        TaskSuite(["letters"], folder)
    assert refused.value.code == "missing_data_set"
    with pytest.raises(InputError, match="no task 'no_such_task'"):
        TaskSuite(["no_such_task"], folder)
    with pytest.raises(InputError, match="no folder of tasks"):
        TaskSuite(["letters"], tmp_path / "elsewhere")


def test_a_specification_names_tasks_and_never_files() -> None:
    spec = {"budget": {"bits": 3}}
    assert parse_config(spec | {"evaluation": {"tasks": ["arc_easy"]}}).evaluation.tasks
    for name in ("../letters", "folder/task.yaml", ""):
        with pytest.raises(SpecError, match="pattern"):
            parse_config(spec | {"evaluation": {"tasks": [name]}})


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_harness_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is loaded')")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    with pytest.raises(InputError, match=r"bitmill\[eval\]") as refused:
        TaskSuite(["piqa"])
    assert (refused.value.code, refused.value.param) == ("missing_extra", "evaluation.tasks")
    done = bitmill(
        *("quantize", model, "--bits", 4, "--tasks", "piqa,boolq", "--out", tmp_path / "out")
    )
    assert done.returncode == 2
    assert "tasks piqa, boolq need the package lm-eval" in done.stderr
    assert "profile" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_report_has_a_column_per_task_and_metric() -> None:
    scores = TaskQuality(
        samples=1838,
        version="1.0",
        metrics={"acc": TaskMetric(value=0.684, se=0.0108), "f1": TaskMetric(value=0.5)},
    )
    rows = [
        QualityRow(method="source", texts={}, tasks={"piqa": scores}),
        QualityRow(method="uniform 3-bit gptq", texts={}),
    ]
    html = task_table(rows)
    assert "<td>source</td><td>0.6840 ± 0.0108</td><td>0.5000</td>" in html
    assert "<th scope=col>piqa, acc</th><th scope=col>piqa, f1</th>" in html
    assert "piqa: 1838" in html
    assert "uniform" not in html
    assert task_table(rows[1:]) == ""
