"""Commands that run the library in a process of its own: results, refusals, and how they end."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitmill.errors import advice
from bitmill.io.manifest import check_folder
from bitmill.pipeline.progress import STAGES
from stores import wait_for
from tiny import CALIBRATION, tiny_llama
from warm_python import FORKED

BITMILL = ["-P", "-m", "bitmill_service.cli.main"]
WINDOWS = [
    *("--calibration-text", str(CALIBRATION), "--held-out", "1"),
    *("--calibration-sequences", "2", "--calibration-length", "64"),
    *("--evaluation-sequences", "1", "--evaluation-length", "64", "--threads", "1"),
    *("--evaluation-texts", "wiki_evaluation"),
]
ROUNDED = ["--bits", "4.5", "--method", "uniform", "--order", "natural", "--refine", "rtn"]


def bitmill(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *BITMILL, *map(str, arguments)],
        env=os.environ | FORKED,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A finished `bitmill quantize`, in the folder `packed` beside the model."""
    return bitmill("quantize", model, "--out", model.parent / "packed", *ROUNDED, *WINDOWS)


@pytest.fixture
def packed(made: subprocess.CompletedProcess[str], model: Path) -> Path:
    assert made.returncode == 0, made.stderr
    return model.parent / "packed"


def test_quantize_tells_its_stages_and_prints_a_table(
    made: subprocess.CompletedProcess[str], packed: Path
) -> None:
    started = re.findall(r"^(\w+): started$", made.stderr, re.MULTILINE)
    assert started == [stage for stage in STAGES if stage != "profile"]
    evaluated = re.findall(r"^evaluate: (\d+)/2 window", made.stderr, re.MULTILINE)
    assert evaluated[0] == "0"  # behind a block of the source
    assert evaluated[-1] == "2"  # one window, read by the source and by the result
    assert re.search(r"^uniform rtn +4\.000 ", made.stdout, re.MULTILINE)
    assert check_folder(packed).files.keys() >= {"model.safetensors", "config.json"}
    assert {path.name for path in packed.parent.iterdir()} == {"m", "packed"}


def test_options_reach_the_report(model: Path, tmp_path: Path) -> None:
    asked = {"budget": {"code_bits": 3}, "evaluation": {"baselines": ["uniform-2"]}}
    (tmp_path / "spec.json").write_text(json.dumps(asked))
    done = bitmill(
        *("quantize", model, "--spec", tmp_path / "spec.json", "--out", tmp_path / "out"),
        *("--work", tmp_path / "w", *ROUNDED, *WINDOWS, "--keep", "*.v_proj", "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    methods = ["source", "uniform rtn", "uniform 2-bit gptq"]
    assert [row["method"] for row in found["rows"]] == methods
    assert (found["folder"], found["learning"]) == (str(tmp_path / "out"), [])
    widths = json.loads((tmp_path / "out" / "bit_width_map.json").read_text())["linears"]
    assert not any(name.endswith("v_proj") for name in widths)
    assert (tmp_path / "w" / "refine" / "stage.json").is_file()


def test_evaluate_measures_what_the_job_measured(packed: Path, model: Path) -> None:
    short = ["--texts", "wiki_evaluation", "--sequences", "1", "--length", "64"]
    measured = bitmill("evaluate", packed, "--source", model, *short, "--json")
    assert re.search(r"^evaluate: (\d+)/\1 window$", measured.stderr, re.MULTILINE)
    rows = json.loads(measured.stdout)["rows"]
    report = json.loads((packed / "quality.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["source", "packed"]
    assert [row["texts"] for row in rows] == [row["texts"] for row in report]


def test_generate_prints_text_as_it_comes_or_json(packed: Path) -> None:
    said = bitmill("generate", packed, "A mill", "--max-new-tokens", "4")
    told = bitmill("generate", packed, "A mill", "--max-new-tokens", "4", "--json")
    found = json.loads(told.stdout)
    assert (found["prompt"], said.stdout) == ("A mill", found["text"] + "\n")
    assert len(found["text"]) == 4
    assert said.stderr == told.stderr == ""


def test_bench_prints_a_line_a_model(packed: Path) -> None:
    timed = bitmill("bench", packed, "--prompt-tokens", "8", "--new-tokens", "2")
    assert [line.split()[0] for line in timed.stdout.splitlines()] == ["packed", "dense"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (["MODEL", "--bits", "3"], "usage"),
        (["--bits", "3", "--out", "out"], "invalid_spec"),
        (["none", "--bits", "3", "--out", "out"], "model_not_found"),
        (["--spec", "hub.json", "--out", "out"], "invalid_input"),
        (["MODEL", "--spec", "map.json", "--out", "out"], "invalid_spec"),
        (["MODEL", "--spec", "learned.json", "--out", "out"], "invalid_spec"),
        (["MODEL", "--bits", "3", "--method", "map", "--map", "job:j", "--out", "out"], None),
    ],
)
def test_what_needs_no_torch_is_refused_at_once(
    command: Any,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: list[str],
    code: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, dict[str, Any]] = {
        "hub": {"model": {"source": "hub", "repo_id": "a/b"}},
        "map": {"allocation": {"method": "map", "map": {"source": "job", "job_id": "j"}}},
        "learned": {
            "refinement": {
                "method": "omniquant",
                "omniquant": {"resume_parameters": {"source": "job", "job_id": "j"}},
            }
        },
    }
    for name, changes in given.items():
        spec = {"budget": {"bits": 3}} | changes
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
    words = [str(model) if word == "MODEL" else word for word in line]
    status, out, err = command("quantize", *words, "--json")
    assert (status, out) == (2, "")
    error = json.loads(err)["error"]
    assert error["code"] == (code or "invalid_format")
    status, out, err = command("quantize", *words)
    assert (status, out) == (2, "")
    more = advice(error["hint"])
    told = error["message"] if more is None else f"{error['message'].rstrip('.')}. {more}"
    assert err.splitlines() == [f"error: {told}"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    [
        ["evaluate", "none", "--source", "."],
        ["evaluate", ".", "--source", "none"],
        ["generate", "none", "A mill"],
        ["bench", "none"],
    ],
)
def test_folders_that_are_not_there_are_told_before_torch_loads(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*line)
    assert (status, out) == (2, "")
    assert "'none' does not exist" in err.splitlines()[0]


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [
        (["quantize", "MODEL", "--code-bits", "1.5", "--out", "OUT"], 2, "impossible_budget"),
        (["quantize", "MODEL", "--bits", "4", "--devices", "64", "--out", "OUT"], 3, None),
        (["generate", "PACKED", ""], 2, "invalid_input"),
        (["generate", "EMPTY", "A"], 2, "invalid_model"),
        (["generate", "PACKED", "A", "--device", "cuda:99"], 3, "no_such_device"),
        (
            ["quantize", "MODEL", "--bits", "4", "--device", "cuda:99", "--out", "OUT"],
            3,
            "no_such_device",
        ),
    ],
)
def test_what_the_child_refuses_is_told_in_one_line(
    packed: Path, model: Path, tmp_path: Path, line: list[str], status: int, code: str | None
) -> None:
    empty = packed.parent / "empty"
    empty.mkdir(exist_ok=True)
    places = {"MODEL": model, "PACKED": packed, "OUT": tmp_path / "out", "EMPTY": empty}
    done = bitmill(*(places.get(word, word) for word in line), "--json")
    assert (done.returncode, done.stdout) == (status, "")
    assert json.loads(done.stderr.splitlines()[-1])["error"]["code"] == (code or "too_few_devices")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "problem"), [("none.txt", "is not there"), ("", "is no file")])
def test_a_calibration_text_that_is_none_is_told_before_any_stage(
    model: Path, tmp_path: Path, name: str, problem: str
) -> None:
    line = ("quantize", model, "--bits", "4", "--out", tmp_path / "out")
    done = bitmill(*line, "--calibration-text", tmp_path / name)
    assert done.returncode == 2
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"error: calibration text {(tmp_path / name).name} {problem}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "param"),
    [
        (["quantize", "MODEL", "--bits", "4", "--out", "out", "--device", "gpu"], "device"),
        (["evaluate", "MODEL", "--source", "MODEL", "--device", "gpu"], "device"),
        (["bench", "MODEL", "--device", "gpu"], "device"),
        (["bench", "MODEL", "--new-tokens", "0"], "new_tokens"),
        (["generate", "MODEL", "A mill", "--device", "gpu"], "device"),
        (["generate", "MODEL", "A mill", "--temperature", "nan"], "temperature"),
        (["generate", "MODEL", "A mill", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["generate", "MODEL", "A mill", "--seed", str(1 << 64)], "seed"),
        (["sweep", "sweep.json", "--out", "out", "--device", "gpu"], "device"),
        (["serve", "--device", "gpu"], "BITMILL_DEVICE"),
        (["worker", "--device", "gpu"], "BITMILL_DEVICE"),
    ],
)
def test_values_that_an_option_cannot_have_are_told_before_torch_loads(
    command: Any,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: list[str],
    param: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = {"model": {"source": "path", "path": str(model)}, "budget": {"bits": 4}}
    (tmp_path / "sweep.json").write_text(json.dumps({"job": spec, "grid": {"seed": [0, 1]}}))
    status, out, err = command(*(str(model) if w == "MODEL" else w for w in line), "--json")
    assert (status, out) == (2, "")
    assert json.loads(err)["error"]["param"] == param
    assert not (tmp_path / "out").exists()


class Running:
    """A `bitmill quantize` that would take minutes, with all processes below it.

    forked: below it is the caller of a process of the library instead of Python itself.
    """

    def __init__(self, model: Path, out: Path, *options: str, until: str, forked: bool) -> None:
        self.folder = out.parent
        self.log = self.folder / "log"
        text = out.parent.parent / "long.txt"
        if not text.exists():
            text.write_text(50 * CALIBRATION.read_text())
        long = ["--calibration-text", str(text), "--calibration-sequences", "700"]
        long += ["--calibration-length", "256"]
        words = [
            sys.executable,
            *BITMILL,
            "quantize",
            str(model),
            "--out",
            str(out),
            "--bits",
            "3",
            *WINDOWS,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*words, *long, *options],
                env=os.environ | (FORKED if forked else {}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.below: list[psutil.Process] = wait_for(lambda: self._below(until), until, 90)

    def _below(self, until: str) -> list[psutil.Process]:
        if until not in self.log.read_text():
            return []
        return psutil.Process(self.process.pid).children(recursive=True)

    def checking(self) -> list[psutil.Process]:
        """All processes below, once one of them checks the packed folder."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return below if any("verify" in p.cmdline() for p in below) else []

    def ended(self) -> tuple[int, list[psutil.Process]]:
        """Its exit status and the processes that it left behind."""
        status = self.process.wait(60)
        _, left = psutil.wait_procs(self.below, timeout=30)
        return status, left


@pytest.fixture
def running(model: Path, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*options: str, until: str = "profile: started", forked: bool = False) -> Running:
        out = tmp_path / "out"
        started.append(Running(model, out, *options, until=until, forked=forked))
        return started[-1]

    yield start
    for run in started:
        for process in [run.process, *run.below]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


@pytest.mark.parametrize(
    ("number", "group", "status", "until", "forked"),
    [
        (signal.SIGINT, True, 130, "profile: started", False),
        (signal.SIGINT, True, 130, "", False),
        (signal.SIGINT, False, 130, "", False),
        (signal.SIGTERM, False, 143, "profile: started", True),
        (signal.SIGTERM, True, 143, "", False),
        (signal.SIGHUP, True, 129, "", False),
        (signal.SIGKILL, False, -9, "profile: started", False),
        (signal.SIGKILL, False, -9, "", False),
    ],
)
def test_a_signal_ends_the_child_too(
    running: Callable[..., Running],
    number: signal.Signals,
    group: bool,
    status: int,
    until: str,
    forked: bool,
) -> None:
    """group: to all processes of the terminal, as Ctrl-C does. until: empty as soon as the child
    is there.
    """
    run = running(until=until, forked=forked)
    assert len(run.below) == 1
    (os.killpg if group else os.kill)(run.process.pid, number)
    assert run.ended() == (status, [])
    assert "Traceback" not in run.log.read_text()
    left = {path.name for path in run.folder.iterdir() if number is not signal.SIGKILL}
    assert left <= {"log"}


def test_a_signal_ends_all_ranks(running: Callable[..., Running]) -> None:
    run = running("--devices", "2")
    assert len([p for p in run.below if "quantize" in p.cmdline()]) == 3
    run.process.terminate()
    assert run.ended() == (143, [])


def test_a_signal_ends_the_check_of_the_packed_folder(running: Callable[..., Running]) -> None:
    run = running(*ROUNDED, "--calibration-sequences", "2", until="verify: started")
    run.below = wait_for(run.checking, "the check's process")
    run.process.terminate()
    assert run.ended() == (143, [])


def test_a_child_that_dies_is_told(running: Callable[..., Running]) -> None:
    run = running(until="")
    (child,) = run.below
    child.kill()
    assert run.ended() == (3, [])
    assert "was ended by signal 9 (SIGKILL)" in run.log.read_text()


def refuse_memory(process: psutil.Process) -> None:
    """From now on the process gets two megabytes more."""
    most = process.memory_info().vms + (2 << 20)
    process.rlimit(psutil.RLIMIT_AS, (most, psutil.RLIM_INFINITY))


TOO_LITTLE = "bytes of host memory are free; what would fit by estimate: calibration."


@pytest.mark.parametrize(
    ("fault", "said", "named"),
    [
        (psutil.Process.kill, "ended by signal 9", False),
        (refuse_memory, TOO_LITTLE, True),
    ],
    ids=["killed, beside the output", "out of memory, work"],
)
def test_finished_stages_are_kept_where_the_machine_fails(
    running: Callable[..., Running],
    model: Path,
    tmp_path: Path,
    fault: Callable[[psutil.Process], None],
    said: str,
    named: bool,
) -> None:
    work = tmp_path / ("w" if named else ".out.bitmill-work")
    option = ["--work", str(work)] if named else []
    run = running(*option, until="profile: started", forked=fault is psutil.Process.kill)
    fault(run.below[0])
    assert run.ended() == (3, [])
    last = run.log.read_text().splitlines()[-1]
    assert said in last
    assert f"finished stages are kept in {work}: " in last
    assert (work / "plan" / "stage.json").is_file()
    again = bitmill("quantize", model, "--out", tmp_path / "out", *ROUNDED, *WINDOWS, *option)
    assert again.returncode == 0
    assert "resolve: skipped" in again.stderr
    assert work.exists() == named


def test_two_runs_do_not_make_one_folder(
    running: Callable[..., Running], model: Path, tmp_path: Path
) -> None:
    first = running(until="plan: finished", forked=True)
    second = bitmill("quantize", model, "--out", tmp_path / "out", *ROUNDED, *WINDOWS)
    assert (second.returncode, second.stdout) == (2, "")
    assert "another job is making" in second.stderr
    assert (tmp_path / ".out.bitmill-work" / "plan" / "stage.json").is_file()
    first.process.terminate()
    assert first.ended() == (143, [])


@pytest.mark.parametrize("mine", ["thesis.txt", "work/thesis.txt"])
def test_own_files_under_the_name_of_scratch_are_not_touched(
    model: Path, tmp_path: Path, mine: str
) -> None:
    file = tmp_path / ".out.bitmill-work" / mine
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    refused = bitmill("quantize", model, "--out", tmp_path / "out", *ROUNDED, *WINDOWS)
    assert refused.returncode == 2
    assert file.read_text() == "years of work"


def test_a_terminal_shows_bars(model: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = [
        sys.executable,
        *BITMILL,
        "quantize",
        str(model),
        "--out",
        str(tmp_path / "out"),
        *ROUNDED,
        *WINDOWS,
    ]
    surroundings = os.environ | FORKED | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env=surroundings)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    assert process.communicate()[0]
    assert process.returncode == 0
    assert b"\x1b[" in shown
    assert "━".encode() in shown
    assert b"refine: started" not in shown


def test_export_says_its_size_writes_it_and_lists_formats(packed: Path, tmp_path: Path) -> None:
    asked = ("export", packed, "--format", "dequantized", "--json")
    half = ("--settings", '{"dtype": "float16"}')
    told = json.loads(bitmill(*asked, *half, "--dry-run").stdout)
    done = bitmill(*asked, *half, "--out", tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == told
    assert told["file_bytes"] == (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert check_folder(tmp_path / "plain").files.keys() >= {"config.json", "tokenizer.json"}
    assert "dequantized" in json.loads(bitmill("export", "--list", "--json").stdout)
    assert re.search(r"^dequantized +exports ", bitmill("export", "--list").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--format", "nothing"], "'nothing' is unknown"),
        (
            ["--format", "dequantized", "--settings", '{"dtype": "int8"}'],
            "setting 'dtype' of format 'dequantized' cannot be 'int8': Input should be",
        ),
        (["--format", "dequantized", "--settings", "[1]"], "no JSON object"),
        ([], "give DIR or JOB, --format and for a folder --out"),
    ],
)
def test_exports_that_cannot_be_are_refused(
    packed: Path, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    done = bitmill("export", packed, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert problem in done.stderr
    assert not (tmp_path / "out").exists()
