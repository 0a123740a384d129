"""The command line: what it prints, as JSON and as text, and how it exits."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bitmill import __version__
from bitmill.errors import BudgetError, InputError
from bitmill_service.cli.docs import commands, help_of
from bitmill_service.cli.progress import JobWatch
from bitmill_service.schemas import EventView
from bitmill_service.units import format_size, parse_size
from bitmill_workers.job_spec import ExportSpec, PathModel
from bitmill_workers.store.jobs import JobStore
from finished import MAP, Stack
from servers import free_port
from stores import claim

SUBMIT = ["submit", "path:models/tiny", "--code-bits", "3", "--method", "uniform"]


@pytest.fixture
def bitmill(monkeypatch: pytest.MonkeyPatch, command: Any, stack: Stack) -> Any:
    """`bitmill ...` for the service of this module."""
    monkeypatch.setenv("BITMILL_URL", stack.url)
    return command


def test_submit_status_list_cancel_retry_delete(bitmill: Any) -> None:
    code, out, _ = bitmill(*SUBMIT, "--label", "cli", "--order", "natural", "--json")
    assert code == 0
    job = json.loads(out)
    assert job["spec"]["allocation"]["method"] == "uniform"
    assert f"{'state:':<16}queued" in bitmill("status", job["id"])[1]
    listed = json.loads(bitmill("list", "--label", "cli", "--json")[1])
    assert [j["id"] for j in listed["jobs"]] == [job["id"]]
    assert "models/tiny" in bitmill("list")[1]
    assert bitmill("cancel", job["id"])[1] == f"job {job['id']} cancelled\n"
    child = json.loads(bitmill("retry", job["id"], "--json")[1])
    assert child["parent_id"] == job["id"]
    assert json.loads(bitmill("delete", job["id"], "--json")[1]) == {"deleted": job["id"]}
    code, _, err = bitmill("status", job["id"])
    gone = f"error: there is no job '{job['id']}'. List the jobs with GET /v1/jobs."
    assert (code, err.splitlines()) == (2, [gone])


def test_nothing_is_asked_for_that_cannot_be_downloaded_to_its_folder(
    bitmill: Any, stack: Stack, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("mine")
    made = stack.succeeded().id
    before = stack.context.jobs.list()
    for words in (
        [*SUBMIT, "--download", str(tmp_path)],
        ["export", made, "--format", "dequantized", "--out", str(tmp_path)],
    ):
        code, out, err = bitmill(*words)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {tmp_path / 'config.json'} is not replaced")
    assert stack.context.jobs.list() == before
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_job_whose_export_waits_is_not_deleted(bitmill: Any, stack: Stack) -> None:
    job = stack.succeeded()
    spec = ExportSpec(format="gptq", model=PathModel(path="models/tiny"), job_id=job.id)
    export = stack.context.jobs.submit(spec).job.id
    told = f"error: job {export} needs job {job.id}. Cancel that job, or wait"
    code, out, err = bitmill("delete", job.id)
    assert (code, out) == (2, "")
    assert err.startswith(told)
    assert bitmill("cancel", export)[0] == 0
    assert bitmill("delete", job.id)[0] == 0


def test_specification_file_is_completed_by_options(bitmill: Any, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"budget": {"bits": 4}, "seed": 9, "label": "from file"}))
    arguments = ["submit", "path:models/tiny", "--spec", str(file), "--size", "400kB"]
    code, out, _ = bitmill(*arguments, "--label", "from option", "--json")
    spec = json.loads(out)["spec"]
    assert code == 0
    assert spec["budget"] == {"code_bits": None, "bits": None, "size": 400_000}
    assert (spec["seed"], spec["label"]) == (9, "from option")


def test_the_version_is_shown(command: Any) -> None:
    assert command("--version") == (0, f"bitmill {__version__}\n", "")


def test_the_command_for_the_next_page_asks_for_the_same(bitmill: Any, stack: Stack) -> None:
    submit = ("submit", "path:models/tiny", "--code-bits", "3", "--label", "of many; these")
    jobs = [bitmill(*submit)[1].split()[1] for _ in range(3)]
    bitmill("submit", "path:models/tiny", "--code-bits", "3", "--label", "another")
    shown = bitmill("list", "--label", "of many; these", "--limit", "1")[1]
    found = [shown.splitlines()[1].split()[0]]
    while "more: " in shown:
        _, *words = shlex.split(shown.rpartition("more: ")[2])
        shown = bitmill(*(word for word in words if not word.startswith("--url=")))[1]
        found.append(shown.splitlines()[1].split()[0])
    assert found == jobs[::-1]
    for job in jobs:
        bitmill("cancel", job)


def test_a_folder_that_is_here_is_not_taken_for_a_repository(
    bitmill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    code, _, err = bitmill("submit", "models/tiny", "--code-bits", "3")
    assert code == 2
    assert "./models/tiny to upload it" in err
    assert "hub:models/tiny" in err


@pytest.mark.parametrize("name", ["my model.gguf", "weights (1).safetensors"])
def test_weights_whose_name_cannot_be_sent_are_named(
    bitmill: Any, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    for place in (tmp_path, tmp_path / name):
        code, _, err = bitmill("submit", str(place), "--code-bits", "3")
        assert code == 2
        assert f"{name!r} cannot be uploaded by this name: rename it" in err


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ('{"budget": {"bits": 3}, "budget": {"bits": 4}}', "'budget' appears twice"),
        ('{"budget": {"bits": 3, "bits": 4}}', "'bits' appears twice"),
        ('{"bugdet": {"bits": 3}}', "bugdet"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "utf-8"),
        ("", "JSON"),
    ],
    ids=["a part twice", "a field twice", "unknown", "deep", "no text", "empty"],
)
def test_a_specification_that_is_not_what_it_seems_is_refused(
    bitmill: Any, tmp_path: Path, written: str, wanted: str
) -> None:
    file = tmp_path / "spec.json"
    file.write_bytes(written.encode(errors="surrogateescape"))
    code, out, err = bitmill("submit", "path:models/tiny", "--spec", str(file), "--code-bits", "3")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert wanted in err


def test_plan_is_shown_without_a_job(bitmill: Any, stack: Stack) -> None:
    before = sum(stack.context.jobs.counts().values())
    code, out, _ = bitmill(*SUBMIT, "--validate-only")
    assert (code, out.splitlines()[0]) == (
        0,
        "llama: 2 blocks, 14 linears, 28 groups, 399,360 weights",
    )
    needs = r"[\d.]+ GB of memory, [\d.]+ [kM]B of disk, about 1 min"
    sizes = r"[\d.]+ kB kept, [\d.]+ kB at 8, [\d.]+ kB at 4 bits"
    readers = "transformers with bitmill.hf, vLLM with bitmill-vllm, SGLang with bitmill-sglang"
    assert out.splitlines()[2] == f"read by: Bitmill, {readers}"
    told = out.splitlines()[3:]
    assert re.fullmatch(rf"embeddings: {sizes} \(--embeddings quantize\)", told[0])
    assert re.fullmatch(f"needs on a CPU: {needs}", told[1])
    assert re.fullmatch(f"needs on accelerators: [\\d.]+ GB of each, {needs}", told[2])
    assert json.loads(bitmill(*SUBMIT, "--validate-only", "--json")[1])["linears"] == 14
    _, out, _ = bitmill(*SUBMIT, "--exports", "dequantized", "--validate-only")
    assert re.search("(?m)^export dequantized: .*, read by transformers, vLLM$", out)
    assert sum(stack.context.jobs.counts().values()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "path:models/tiny"],
        ["submit", "path:models/tiny", "--bits", "3", "--code-bits", "3"],
        ["submit", "path:models/tiny", "--code-bits", "1.5"],
        ["submit", "path:elsewhere/tiny", "--code-bits", "3"],
        ["submit", "--code-bits", "3"],
        ["submit", "path:models/tiny", "--size", "huge"],
        ["submit", "path:models/tiny", "--size", "nan"],
        ["submit", "path:models/tiny", "--code-bits", "3", "--transforms", "[" * 100_000],
        ["submit", "path:models/tiny", "--code-bits", "3", "--key", "clé"],
        ["submit", "path:models/tiny", "--code-bits", "3", "--key", "two\nlines"],
        ["status"],
        ["status", ""],
        ["status", "two\nlines"],
        ["delete", "../uploads/0"],
        ["delete", "a?b"],
        ["logs", "--follow", ".."],
        ["sweeps", "show", ""],
        ["nonsense"],
        ["report", "no-such-job"],
        ["report", "no-such-folder", "--html", "report.html"],
    ],
)
def test_refused_input_exits_with_2(bitmill: Any, arguments: list[str]) -> None:
    code, out, err = bitmill(*arguments)
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (("--code-bits", "1.5"), "code_bits = 1.5 cannot be met: the smallest that fits the"),
        (("--bits", "1"), "bits = 1.0 cannot be met: the smallest that fits the constraints is"),
        (("--size", "10kB"), "size = 10,000 bytes cannot be met: the smallest that fits the"),
        (("--memory", "10kB", "--context", "64"), "memory = 10,000 bytes cannot be met: the"),
    ],
)
def test_what_to_do_about_a_budget_is_said_once(
    bitmill: Any, budget: tuple[str, ...], told: str
) -> None:
    code, _, err = bitmill("submit", "path:models/tiny", *budget)
    assert code == 2
    assert err.startswith(f"error: budget {told}")
    assert err.endswith(". Raise the budget, allow a smaller width or quantize fewer linears.\n")
    assert err.lower().count("raise the budget") == 1


def test_a_hint_that_only_refers_to_the_message_is_not_printed(bitmill: Any) -> None:
    code, _, err = bitmill("submit", "path:models/tiny", "--size", "huge")
    assert (code, err) == (
        2,
        "error: 'huge' is no size: give bytes, or a number with kB, MB, GB, TB, MiB or GiB\n",
    )
    _, _, err = bitmill("submit", "path:models/tiny", "--size", "huge", "--json")
    assert json.loads(err)["error"]["hint"] == "Correct the request as the message says."
    _, _, err = bitmill("list", "--state", "nope")
    assert err.startswith("error: state: Input should be 'queued', 'running', ")
    assert err.endswith(" or 'cancelled'\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["quantize", "FILE"], "FILE is no folder: give the folder of the model"),
        (["quantize", "m.gguf"], "m.gguf is a file: give its folder, ., and --file m.gguf"),
        (["quantize", "org/name"], "there is no folder org/name: quantize reads local models;"),
        (["quantize", ".", "--spec", "none"], "none cannot be read as JSON: No such file or dir"),
        (["quantize", ".", "--map", "m.json", "--method", "map"], "this folder holds no m.json"),
        (["sweep", "none.yaml"], "none.yaml cannot be read as YAML: No such file or directory"),
        (["sweep", "."], ". cannot be read as YAML: Is a directory"),
        (["map", "picture", "m.gguf", "--out", "m.png"], "m.png would hold SVG, whatever its"),
        (["serve", "--data", "FILE"], "FILE is no folder: --data and BITMILL_DATA name one"),
        (["worker", "--data", "FILE"], "FILE is no folder: --data and BITMILL_DATA name one"),
        (["db", "upgrade", "--data", "FILE"], "FILE is no folder: --data and BITMILL_DATA name"),
    ],
)
def test_a_file_or_folder_that_is_none_is_told_in_words(
    bitmill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    (tmp_path / "m.gguf").write_text(json.dumps(MAP))
    if words[0] == "quantize":
        words = [*words, "--out", "out", *([] if "--map" in words else ["--bits", "3"])]
    code, out, err = bitmill(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {told}")


@pytest.mark.parametrize(
    "words", [["report"], ["map", "show"], ["export", "--format", "gguf"], ["map", "diff", "FILE"]]
)
def test_a_mistyped_folder_is_not_told_as_a_job_alone(
    bitmill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text(json.dumps(MAP))
    code, _, err = bitmill(*words, "pakced")
    assert code == 2
    assert "there is no job 'pakced'; and there is no folder pakced here" in err
    code, _, err = bitmill(*words, "pakced", "--url", f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert "no answer from " in err
    assert "and there is no folder pakced here" in err


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_is_no_crash_and_no_file_takes_its_place(
    tmp_path: Path, closed: int
) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps(MAP))
    program = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "map", "show", str(file)]
    line = f"exec {shlex.join(program)} {closed}>&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed != 1)


def test_errors_are_json_where_json_was_asked_for(bitmill: Any) -> None:
    _, out, err = bitmill("submit", "path:models/tiny", "--code-bits", "1.5", "--json")
    assert out == ""
    error = json.loads(err)["error"]
    assert (error["code"], error["param"]) == ("impossible_budget", "budget.code_bits")
    assert error["hint"]


def test_wait_exits_by_how_the_job_ended(bitmill: Any, stack: Stack) -> None:
    store: JobStore = stack.context.jobs
    queued = stack.queued().id
    assert bitmill("wait", queued, "--timeout", "0.1")[0] == 5
    store.request_cancel(queued)
    assert bitmill("wait", queued)[0] == 4
    code, out, err = bitmill("wait", stack.failed().id)
    assert (code, "it is broken" in err) == (3, True)
    assert err.splitlines()[-1].endswith(" failed: it is broken")
    assert out.splitlines()[-1] == "job failed"
    assert bitmill("wait", stack.succeeded().id)[0] == 0


def test_status_of_a_failed_job_says_what_to_do(bitmill: Any, stack: Stack) -> None:
    _, out, _ = bitmill("status", stack.failed().id)
    assert "invalid_model: it is broken" in out
    assert "what to do" not in out
    job = stack.running()
    assert stack.leases.fail(job.id, job.token, BudgetError("it is too small"))
    _, out, _ = bitmill("status", job.id)
    assert "impossible_budget: it is too small" in out
    assert f"what to do:     {BudgetError.hint}" in out


def test_download_log_and_map(bitmill: Any, stack: Stack, tmp_path: Path) -> None:
    job = stack.succeeded()
    code, out, _ = bitmill("download", job.id, "--out", str(tmp_path / "out"))
    assert code == 0
    assert "5 files fetched" in out
    again = json.loads(bitmill("download", job.id, "-o", str(tmp_path / "out"), "--json")[1])
    assert (again["fetched"], again["bytes_fetched"], len(again["skipped"])) == ([], 0, 5)
    assert json.loads(bitmill("map", "show", job.id, "--json")[1]) == MAP
    drawing = tmp_path / "map.svg"
    bitmill("map", "picture", job.id, "--out", str(drawing))
    assert drawing.read_text().startswith("<svg ")
    shown = bitmill("map", "show", str(tmp_path / "out"))[1]
    assert "1 of 2 bits, 2 of 3 bits, 1 of 4 bits" in shown
    other = tmp_path / "other.json"
    other.write_text(json.dumps(MAP | {"linears": MAP["linears"] | {"extra": "3"}}))
    difference = json.loads(bitmill("map", "diff", job.id, str(other), "--json")[1])
    assert difference == {"extra": ["", "3"]}
    running = stack.running()
    stack.leases.append_log(running.id, running.token, b"hello\n", limit=1000)
    assert bitmill("logs", running.id)[1] == "hello\n"


def test_submit_with_download_prints_one_json_document(
    bitmill: Any, stack: Stack, tmp_path: Path
) -> None:
    key = ["--key", "downloaded", "--json"]
    job = json.loads(bitmill(*SUBMIT, *key)[1])["id"]
    stack.finish(claim(stack.leases, job))
    code, out, _ = bitmill(*SUBMIT, *key, "--download", str(tmp_path / "out"))
    done = json.loads(out)
    assert (code, done["id"], done["state"]) == (0, job, "succeeded")
    assert len(done["download"]["fetched"]) == 5


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("file", "path_in_the_way"),
        ("file/deep/out", "path_in_the_way"),
        ("nowhere", "path_in_the_way"),
        ("a" * 300, "cannot_write"),
    ],
)
def test_a_folder_that_takes_no_download_is_told_before_a_job_is_made(
    bitmill: Any, stack: Stack, tmp_path: Path, place: str, code: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    refuses_to_submit(bitmill, stack, tmp_path / place, code)


def test_a_disk_that_can_only_be_read_is_told_before_a_job_is_made(
    bitmill: Any, stack: Stack, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refuses_to_submit(bitmill, stack, small_disk / "out", "cannot_write")


def refuses_to_submit(bitmill: Any, stack: Stack, folder: Path, code: str) -> None:
    before = [job.id for job in stack.context.jobs.list().jobs]
    ended, _, err = bitmill(*SUBMIT, "--order", "natural", "--json", "--download", str(folder))
    assert (ended, json.loads(err)["error"]["code"]) == (2, code)
    assert [job.id for job in stack.context.jobs.list().jobs] == before


def test_bad_setting_is_named_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.setenv("BITMILL_PORT", "many")
    code, _, err = command("doctor")
    assert (code, "BITMILL_PORT" in err, "Traceback" in err) == (2, True, False)


def test_service_that_is_not_there_exits_with_1(command: Any) -> None:
    code, _, err = command("list", "--url", "http://127.0.0.1:9")
    assert (code, "bitmill serve" in err) == (1, True)


def test_database_is_made_and_reported(command: Any, tmp_path: Path) -> None:
    code, out, _ = command("db", "upgrade", "--data", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["revision"]
    assert (tmp_path / "bitmill.db").is_file()


def run_alone(*words: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """`bitmill ...` in a process of its own."""
    line = [sys.executable, "-P", "-m", "bitmill_service.cli.main", *map(str, words)]
    env = os.environ | settings
    return subprocess.run(line, capture_output=True, text=True, env=env, timeout=120, check=False)


@pytest.mark.parametrize(
    "line",
    [
        "keys list",
        "backup {0}/b",
        "db upgrade",
        "serve --port 0",
        "worker",
        "restore {0}/damaged",
    ],
)
def test_a_database_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, line: str) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "bitmill.db").write_bytes(b"not what it was " * 512)
    data = tmp_path / "new" if line.startswith("restore") else damaged
    done = run_alone(*line.format(tmp_path).split(), "--data", data)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "damaged/bitmill.db cannot be used: file is not a database. See that" in done.stderr


@pytest.mark.parametrize("line", ["keys list", "prune", "db upgrade", "serve --port 0", "worker"])
def test_a_database_that_is_away_is_told_without_its_password(tmp_path: Path, line: str) -> None:
    away = f"postgresql+psycopg://bitmill:canary@127.0.0.1:{free_port()}/bitmill"
    done = run_alone(*line.split(), "--data", tmp_path, BITMILL_DATABASE_URL=away)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "bitmill:***@127.0.0.1" in done.stderr
    assert "Connection refused" in done.stderr
    assert "canary" not in done.stdout + done.stderr


def test_every_command_takes_json_and_shows_an_example_that_it_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("packed", "models/SmolLM2-135M"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path, found in commands():
        text = " ".join(help_of(path).split())
        assert "--json" in text, path
        example = re.search(rf"Example: bitmill {' '.join(path)} ?(.*?) (Arguments|Options):", text)
        assert example, path
        found.make_context(path[-1], shlex.split(example[1]))


def test_usage_errors_are_one_line_or_one_document(command: Any) -> None:
    code, out, err = command("submit", "--qqq")
    assert (code, out) == (2, "")
    assert err.splitlines() == ["error: No such option: --qqq. See `bitmill submit --help`."]
    code, out, err = command("wait", "--json")
    assert (code, out) == (2, "")
    error = json.loads(err)["error"]
    assert (error["code"], error["message"]) == ("usage", "Missing argument 'JOB'.")


def test_a_place_that_cannot_be_written_to_is_named(command: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, err = command("db", "upgrade", "--data", tmp_path / "file" / "below")
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path}/file/below: Not a directory\n"


def test_command_line_and_api_never_load_torch() -> None:
    code = (
        "import sys, bitmill_service.cli.main, bitmill_service.main\n"
        "import bitmill_service.client.client\n"
        "assert not {'torch', 'triton', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("120000000", 120_000_000),
        ("120MB", 120_000_000),
        ("1.5 GB", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("1k", 0),
        ("-3MB", 0),
        ("MB", 0),
        ("1e400", 0),
        ("nan", 0),
        ("inf", 0),
    ],
)
def test_sizes_are_read_or_refused(text: str, size: int) -> None:
    if size:
        assert parse_size(text) == size
    else:
        with pytest.raises(InputError, match="no size"):
            parse_size(text)


def test_sizes_are_shown_in_decimal_units() -> None:
    sizes = [999, 1000, 999_949, 999_950, 97_650_000, 3 * 10**15]
    assert [format_size(size) for size in sizes] == [
        "999 B",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "97.7 MB",
        "3000.0 TB",
    ]


def _event(kind: str, **data: Any) -> EventView:
    return EventView.model_validate({"seq": 1, "at": 0, "kind": kind, "data": data})


@pytest.mark.parametrize("terminal", [False, True])
def test_watch_shows_stages_and_blocks(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    with JobWatch(console) as watch:
        watch.on_event(_event("state", state="running"))
        watch.on_event(_event("stage", stage="refine", state="started"))
        for done in range(1, 4):
            watch.on_event(_event("progress", stage="refine", done=done, total=3, unit="block"))
        watch.on_event(_event("stage", stage="refine", state="finished"))
        watch.on_event(_event("warning", stage="refine", message="damped"))
        watch.on_event(_event("something new", value=1))
    shown = out.getvalue()
    assert "job running" in shown
    assert "warning: damped" in shown
    assert "3/3" in shown
    assert ("refine: 2/3" in shown) is False
