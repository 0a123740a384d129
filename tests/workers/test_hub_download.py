"""Downloads from a Hub that errs: what arrives is what the Hub says it is, or the job says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

import faulty_hub
from bitmill.errors import ModelError, ResourceError
from bitmill_workers.execution.fetch import fetch_model
from bitmill_workers.execution.hub_download import asked_wait
from bitmill_workers.job_spec import HubModel
from bitmill_workers.settings import Settings
from faulty_hub import COMMIT, FaultyHub, Mistake, serving, status

WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"model_type": "llama"}' + b" " * 1000,
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}" * 500,
    "LICENSE": b"Free.",
    "additional_chat_templates/rag.jinja": b"R",
}
MODEL = HubModel(repo_id="org/tiny")


@pytest.fixture
def hub() -> Iterator[FaultyHub]:
    with serving(FaultyHub(FILES)) as server:
        yield server


@pytest.fixture
def settings(settings: Settings, hub: FaultyHub) -> Settings:
    """Settings with this Hub, and a patience that a test can wait for."""
    return settings.model_copy(update={"hub_endpoint": hub.url, "hub_patience_s": 5.0})


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def blob(settings: Settings, file: str) -> Path:
    place = settings.hub_cache / "models--org--tiny/snapshots" / COMMIT / file
    return place.resolve(strict=True)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "LICENSE"])
@pytest.mark.parametrize("tags", ["git", "sha256", "none"])
@pytest.mark.parametrize(
    "mistake", [faulty_hub.wrong_bytes, faulty_hub.too_long, faulty_hub.too_short]
)
def test_wrong_bytes_are_fetched_again(
    hub: FaultyHub, settings: Settings, file: str, tags: str, mistake: Mistake
) -> None:
    hub.tags = tags
    hub.mistakes[f"GET {file}"] = [mistake]
    assert contents(fetch_model(MODEL, settings)) == FILES
    assert len(hub.asked("GET", file)) == 2


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "LICENSE"])
@pytest.mark.parametrize("lists_digests", [True, False])
def test_bytes_that_stay_wrong_have_a_code_of_their_own(
    hub: FaultyHub, settings: Settings, file: str, lists_digests: bool
) -> None:
    hub.lists_digests = lists_digests
    hub.mistakes[f"GET {file}"] = [faulty_hub.wrong_bytes] * 9
    with pytest.raises(ModelError, match=file) as caught:
        fetch_model(MODEL, settings)
    assert (caught.value.code, caught.value.param) == ("hub_wrong_bytes", file)
    assert len(hub.asked("GET", file)) == 2
    hub.mistakes.clear()
    assert contents(fetch_model(MODEL, settings)) == FILES


@pytest.mark.parametrize("request_", ["GET ", "HEAD config.json", "GET config.json", "GET LICENSE"])
@pytest.mark.parametrize(
    "mistake",
    [status(500), status(502), status(503), status(429), faulty_hub.soon, faulty_hub.dropped],
)
def test_passing_faults_are_waited_out_at_every_request(
    hub: FaultyHub, settings: Settings, request_: str, mistake: Mistake
) -> None:
    hub.mistakes[request_] = [mistake, None, mistake]
    notes: list[dict[str, object]] = []
    assert contents(fetch_model(MODEL, settings, notes.append)) == FILES
    warnings = [str(note["message"]) for note in notes if note["kind"] == "warning"]
    assert len(warnings) == 1
    assert "next try in" in warnings[0]


@pytest.mark.parametrize("mistake", [faulty_hub.reset, faulty_hub.closed])
def test_what_has_arrived_is_kept(hub: FaultyHub, settings: Settings, mistake: Mistake) -> None:
    hub.mistakes["GET model.safetensors"] = [mistake, status(503), mistake]
    assert contents(fetch_model(MODEL, settings)) == FILES
    ranges = [request.range for request in hub.asked("GET", "model.safetensors")]
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges if r is not None]
    assert ranges[0] is None
    assert starts == sorted(starts)
    assert starts[0] > 0
    # The second break came after more bytes than the first.
    assert starts[-1] > starts[0]


def test_what_has_arrived_is_kept_for_the_next_job(hub: FaultyHub, settings: Settings) -> None:
    hub.mistakes["GET model.safetensors"] = [faulty_hub.closed, *[status(503)] * 9]
    short = settings.model_copy(update={"hub_patience_s": 1.0})
    with pytest.raises(ModelError) as caught:
        fetch_model(MODEL, short)
    assert caught.value.code == "hub_unreachable"
    hub.mistakes.clear()
    hub.requests.clear()
    assert contents(fetch_model(MODEL, settings)) == FILES
    assert [r.range for r in hub.asked("GET", "model.safetensors")] == [
        f"bytes={len(WEIGHTS) // 2}-"
    ]
    assert not hub.asked("GET", "config.json")


def test_a_part_with_wrong_bytes_is_thrown_away(hub: FaultyHub, settings: Settings) -> None:
    hub.mistakes["GET model.safetensors"] = [
        lambda answer, data, headers: faulty_hub.closed(answer, b"?" * len(data), headers)
    ]
    assert contents(fetch_model(MODEL, settings)) == FILES
    assert [r.range for r in hub.asked("GET", "model.safetensors")][-1] is None


def test_a_hub_without_ranges_starts_again(hub: FaultyHub, settings: Settings) -> None:
    hub.ranges = False
    hub.mistakes["GET model.safetensors"] = [faulty_hub.reset]
    assert contents(fetch_model(MODEL, settings)) == FILES


def test_a_transfer_that_always_breaks_at_one_place_ends(
    hub: FaultyHub, settings: Settings
) -> None:
    hub.ranges = False
    hub.mistakes["GET model.safetensors"] = [faulty_hub.closed] * 99
    short = settings.model_copy(update={"hub_patience_s": 2.0})
    with pytest.raises(ModelError) as caught:
        fetch_model(MODEL, short)
    assert caught.value.code == "hub_unreachable"


def test_retry_after_is_honoured(hub: FaultyHub, settings: Settings) -> None:
    hub.mistakes["GET model.safetensors"] = [status(429, Retry_After="2")]
    notes: list[dict[str, object]] = []
    fetch_model(MODEL, settings, notes.append)
    (warning,) = [note["message"] for note in notes if note["kind"] == "warning"]
    assert warning == "model.safetensors: status 429; next try in 2.0 s"


def test_a_wait_beyond_patience_ends_at_once(hub: FaultyHub, settings: Settings) -> None:
    hub.mistakes["GET model.safetensors"] = [status(429, Retry_After="3600")]
    with pytest.raises(ModelError, match="asks to wait 3600 s") as caught:
        fetch_model(MODEL, settings)
    assert caught.value.code == "hub_unreachable"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "Thu, 01 Jan 2015 00:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
    ],
)
def test_asked_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait(headers) == seconds


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "LICENSE"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "longer"])
def test_damaged_cache_is_noticed_and_mended(
    hub: FaultyHub, settings: Settings, file: str, damage: str
) -> None:
    fetch_model(MODEL, settings)
    place, data = blob(settings, file), FILES[file]
    changed = {
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[: len(data) // 2],
        "emptied": b"",
        "longer": data + b"x",
    }
    place.write_bytes(changed[damage])
    hub.requests.clear()
    notes: list[dict[str, object]] = []
    assert contents(fetch_model(MODEL, settings, notes.append)) == FILES
    assert [r.file for r in hub.requests if r.method == "GET" and r.file] == [file]
    assert any("damaged" in str(note.get("message")) for note in notes)


def test_an_intact_cache_is_not_fetched_again(hub: FaultyHub, settings: Settings) -> None:
    first = fetch_model(MODEL, settings)
    hub.requests.clear()
    assert fetch_model(MODEL, settings) == first
    assert [r.file for r in hub.requests if r.method == "GET"] == [""]


def test_the_cache_is_shared_with_the_hubs_own_client(
    hub: FaultyHub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    hf_hub_download(
        "org/tiny",
        "model.safetensors",
        cache_dir=settings.hub_cache,
        endpoint=hub.url,
        token=False,
    )
    hub.requests.clear()
    assert contents(fetch_model(MODEL, settings)) == FILES
    assert not hub.asked("GET", "model.safetensors")


def repository(*names: str) -> dict[str, bytes]:
    return {name: name.encode() for name in names}


UNWANTED = (
    "README.md",
    ".gitattributes",
    "modeling_x.py",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/consolidated.00.pth",
    "training_args.json",
    "trainer_state.json",
    "model.fp16.gguf",
    "../escape.safetensors",
)
INDEX = json.dumps(
    {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
).encode()
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("files", "file", "wanted"),
    [
        (repository("model.safetensors"), None, {"model.safetensors"}),
        (repository("model.safetensors", *SHARDS), None, {"model.safetensors"}),
        (
            {"model.safetensors.index.json": INDEX} | repository(*SHARDS, "other.safetensors"),
            None,
            {*SHARDS, "model.safetensors.index.json"},
        ),
        (
            {"model.safetensors.index.json": b"{damaged"} | repository(*SHARDS),
            None,
            {*SHARDS, "model.safetensors.index.json", "consolidated.safetensors"},
        ),
        (repository("model.safetensors"), "model.fp16.gguf", {"model.fp16.gguf"}),
    ],
)
def test_only_needed_files_are_fetched(
    hub: FaultyHub,
    settings: Settings,
    files: dict[str, bytes],
    file: str | None,
    wanted: set[str],
) -> None:
    kept = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    hub.files = kept | repository(*UNWANTED) | files
    folder = fetch_model(HubModel(repo_id="org/tiny", file=file), settings)
    assert set(contents(folder)) == set(kept) | wanted
    assert {r.file for r in hub.requests if r.method == "GET"} == {"", *kept, *wanted}


@pytest.mark.parametrize(
    ("code", "expected"), [(401, "model_gated"), (403, "model_gated"), (404, "file_not_found")]
)
def test_a_refused_file_is_not_asked_for_again(
    hub: FaultyHub, settings: Settings, code: int, expected: str
) -> None:
    hub.mistakes["GET model.safetensors"] = [status(code)]
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        fetch_model(MODEL, settings)
    assert caught.value.code == expected
    assert len(hub.asked("GET", "model.safetensors")) == 1


def test_the_token_stays_with_the_hub_and_an_expired_address_is_asked_for_again(
    hub: FaultyHub, settings: Settings
) -> None:
    settings = settings.model_copy(update={"hub_token": SecretStr("hf_secret")})
    with serving(FaultyHub(FILES)) as store:
        hub.elsewhere = store.url
        store.mistakes["GET model.safetensors"] = [faulty_hub.closed, status(403), status(400)]
        assert contents(fetch_model(MODEL, settings)) == FILES
    assert all(request.authorized for request in hub.requests)
    assert len(store.asked("GET", "model.safetensors")) == 4
    assert not any(request.authorized for request in store.requests)


def test_a_redirected_file_is_compared_with_what_the_hub_links(
    hub: FaultyHub, settings: Settings
) -> None:
    hub.lists_digests = False
    with serving(FaultyHub(FILES)) as store:
        hub.elsewhere, store.tags = store.url, "none"
        store.mistakes["GET model.safetensors"] = [faulty_hub.wrong_bytes]
        assert contents(fetch_model(MODEL, settings)) == FILES
        assert len(store.asked("GET", "model.safetensors")) == 2


def test_files_with_the_same_bytes_are_fetched_once(hub: FaultyHub, settings: Settings) -> None:
    same = ("LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.md", "COPYING", "USE_POLICY.md")
    hub.files = FILES | dict.fromkeys(same, b"Free." * 1000)
    assert contents(fetch_model(MODEL, settings)) == hub.files
    asked = [request.file for request in hub.requests if request.method == "GET"]
    assert len(set(asked) & set(same)) == 1


def test_two_jobs_at_once_fetch_once(hub: FaultyHub, settings: Settings) -> None:
    found: list[dict[str, bytes]] = []
    threads = [
        threading.Thread(target=lambda: found.append(contents(fetch_model(MODEL, settings))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [FILES] * 3
    assert len(hub.asked("GET", "model.safetensors")) == 1


def test_a_disk_that_fills_up_is_told(hub: FaultyHub, settings: Settings, small_disk: Path) -> None:
    hub.files["model.safetensors"] = WEIGHTS * 3
    hub.large.clear()
    hub.lists_digests, hub.tags = False, "none"
    hub.mistakes["HEAD model.safetensors"] = [status(405)]
    with pytest.raises(ResourceError) as caught:
        fetch_model(MODEL, settings.model_copy(update={"data": small_disk}))
    assert caught.value.code == "disk_full"
    assert not list(small_disk.rglob("*.part"))
