"""A corpus of hostile files, paths, names and bodies: each is refused by name, fast.

The corpus is made here from a list of faults; a test counts it. Files are looked at by the same
checks whether they lie below a root, are uploaded or come from the Hub, so a root is used here. A
canary lies beside every root: what is in it must never come out again.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from finished import spec_json
from pace import limit
from serving import serve
from tiny import tiny_llama

CANARY = "canary-7f3a91c2-never-to-be-seen"
_SECONDS = 5.0
_MEMORY = 500 << 20

Broken = Callable[[Path], None]


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def one(data: bytes = bytes(8), **changes: Any) -> bytes:
    return header(json.dumps({"a": entry(**changes)}).encode(), data)


WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01",
    "length only": struct.pack("<Q", 2),
    "length 2^63": header(b"{}", length=2**63),
    "length 2^64-1": header(b"{}", length=2**64 - 1),
    "length over the file": header(b"{}", length=1000),
    "no JSON": header(b"\xff" * 50),
    "a list": header(b"[]"),
    "a number": header(b"1"),
    "null": header(b"null"),
    "deep list": header(b"[" * 100_000),
    "deep object": header(b'{"a":' * 50_000),
    "huge number": header(b'{"a":' + b"9" * 5000 + b"}"),
    "NaN": header(b'{"a":NaN}'),
    "same name twice": header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "bytes left over": one(bytes(9)),
    "bytes missing": one(bytes(7)),
    "UTF-16": header(json.dumps({"a": entry()}).encode("utf-16"), bytes(8)),
    "half a surrogate": header(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "many empty tensors": header(
        json.dumps({f"t{i}": entry(shape=[0], data_offsets=[0, 0]) for i in range(50_000)}).encode()
    ),
    "pickle inside": b"\x80\x04\x95" + b"cos\nsystem\n" * 20,
    "zip inside": b"PK\x03\x04" + bytes(100),
    "gzip inside": b"\x1f\x8b\x08" + bytes(100),
    "text": b"#!/bin/sh\nid\n" * 10,
    **{
        f"dtype {value!r}"[:40]: one(dtype=value)
        for value in ("", "F33", "f32", None, 1, [], {}, "I0", "../F32", "F32\0")
    },
    **{
        f"shape {value!r}"[:40]: one(shape=value)
        for value in (
            *(None, "2", 2, [-2], [2.0], ["2"], [True, True], [[2]], {}, [2**63], [2**64, 2**64]),
            *([0, 2**62], [1] * 1000, [3], [1], [2, 2], [None]),
        )
    },
    **{
        f"offsets {value!r}"[:40]: one(data_offsets=value)
        for value in (
            *(None, [], [0], [0, 8, 8], [8, 0], [-8, 0], [0, 2**63], [0, 2**70], ["0", "8"]),
            *([0.0, 8.0], [4, 12], [1, 9], {}, "08", [False, 8]),
        )
    },
}

CONFIGS: dict[str, Any] = {
    **{
        f"{name}={value!r}"[:60]: {name: value}
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
        for value in (-1, 0, 10**12, 2**63, 1.5, "64", None, [], {}, True, "1e9")
    },
    **{
        f"{name}={value!r}"[:60]: {name: value}
        for name in ("intermediate_size", "num_key_value_heads", "head_dim")
        for value in (-1, 0, 10**12, 2**63, 1.5, "64", [], {})
    },
    **{
        f"model_type={value!r}"[:60]: {"model_type": value}
        for value in (None, "", 1, [], {}, "../llama", "llama\0", "x" * 5000, "__import__", "ö")
    },
}

PATHS = [
    *("", ".", "..", "/", "//", "~", "models", "models/", "models/absent", "models/..", "x/tiny"),
    *("../models/tiny", "models/../../etc/passwd", "models/tiny/../../secret", "/etc/passwd"),
    *("models/./../secret", "models\\tiny", "models/tiny\\..\\..\\secret", "models/%2e%2e/secret"),
    *("file:///etc/passwd", "http://169.254.169.254/", "models/tiny\0", "\0", "models/\0tiny"),
    *(
        "models/" + "a" * 300,
        "models/" + "a/" * 2000,
        "models/ö",
        "models/\u202etiny",
        "MODELS/tiny",
    ),
    *("models/link", "models/link/config.json", "models/tiny/config.json", "models/fifo"),
    *("models/tiny ", " models/tiny", "models//..//secret", "C:\\Windows", "models/.../tiny"),
    *("models\\..\\secret", "....//secret", "/proc/self/environ", "/dev/zero", "~root", "~/x"),
    *(
        "\\\\host\\share",
        "//host/share",
        "models/tiny/..",
        "secret",
        "data",
        "models/../models/tiny",
    ),
    *("$HOME", "`id`", "$(id)", "models/tiny;id", "|id", "models/\n", "models/tiny\r\nX: y"),
]

REPOSITORIES = [
    *("", "..", "../x", "a/b/c", "a/../b", "http://evil.example/x", "a b", "a\nb", "a\r\nb", "ö/x"),
    *("a/b?c", "a/b#c", "a%2fb", "/a", "a/", "a//b", "x" * 97 + "/b", "a/" + "x" * 97, "a\0b"),
    *("a/..", "./b", "a/.", ".", "./.", "../..", "a,b", "a;b", "a|b", "$(id)", "a/b@", "`id`"),
    *("@a/b", "a:b", "a\\b", "user@host/x", "[::1]/x"),
]

BODIES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "list": b"[]",
    "number": b"1",
    "text": b'"x"',
    "null": b"null",
    "UTF-16": "{}".encode("utf-16"),
    "NUL": b"\0" * 100,
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "huge number": b'{"seed": ' + b"9" * 5000 + b"}",
    "NaN": b'{"seed": NaN}',
    "Infinity": b'{"budget": {"bits": Infinity}}',
    "many members": json.dumps({f"k{i}": i for i in range(20_000)}).encode(),
    "long name": json.dumps({"k" * 100_000: 1}).encode(),
    "XML": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><x>&a;</x>",
    "YAML": b"!!python/object/apply:os.system ['id']",
    "pickle": b"\x80\x04cos\nsystem\n.",
    "form": b"model=x&budget=3",
}

FIELDS: dict[str, Any] = {
    **{
        f"label {index}": {"label": value}
        for index, value in enumerate([1, [], {}, "x" * 201, True])
    },
    **{f"seed {value!r}"[:40]: {"seed": value} for value in (-1, 2**31, 2**70, 1.5, "x", [], None)},
    **{
        f"bits {value!r}"[:40]: {"budget": {"code_bits": value}}
        for value in (0, -3, 1e-300, "x", [], {}, None, 1.0)
    },
    **{
        f"threads {value!r}"[:40]: {"threads": value}
        for value in (0, -1, 1025, 2**70, 1.5, "x", [])
    },
    **{
        f"unknown {name}": {name: 1}
        for name in ("__class__", "constructor", "auto_map", "trust_remote_code", "token", "env")
    },
    **{
        f"file {value!r}"[:40]: {"model": {"source": "path", "path": "models/tiny", "file": value}}
        for value in ("../x.gguf", "/etc/x.gguf", "a/b.gguf", "x.bin", "x.gguf\0", "absent.gguf")
    },
    **{
        f"text {value!r}"[:40]: {"calibration": {"text": {"source": "file", "path": value}}}
        for value in ("../secret", "/etc/passwd", "models/link", "models/\0", "models/absent")
    },
    **{
        f"resume {value!r}"[:40]: {
            "refinement": {
                "method": "omniquant",
                "omniquant": {"resume_parameters": {"source": "path", "path": value}},
            }
        }
        for value in ("../secret", "/etc", "models/link", "models/" + "a" * 300)
    },
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx2.Client, Path]]:
    """A service whose root has a good model, and secrets beside the root."""
    place = tmp_path_factory.mktemp("hostile")
    root = place / "models"
    tiny_llama(root / "tiny")
    (place / "secret").mkdir()
    (place / "secret" / "config.json").write_text(json.dumps({"model_type": CANARY}))
    (root / "link").symlink_to(place / "secret")
    os.mkfifo(root / "fifo")
    settings = ServiceSettings(data=place / "data", model_roots={"models": root})
    app = create_app(settings)
    upgrade(app.state.context.database)
    with serve(app) as url, httpx2.Client(base_url=url, timeout=90) as http:
        http.post("/v1/jobs?validate_only=true", json=spec_json())  # what is made once is made
        yield http, root


def refused(http: httpx2.Client, spec: Any, *, raw: bytes | None = None) -> dict[str, Any]:
    """The problem of a job that must be refused, within the limits of time and memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    content = json.dumps(spec).encode() if raw is None else raw
    headers = {"Content-Type": "application/json"}
    answer = http.post("/v1/jobs?validate_only=true", content=content, headers=headers)
    spent = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert 400 <= answer.status_code < 500, answer.text
    assert CANARY not in answer.text
    assert "Traceback" not in answer.text
    assert spent < limit(_SECONDS)
    assert grown < _MEMORY
    problem: dict[str, Any] = answer.json()
    assert problem["code"]
    assert problem["detail"]
    return problem


def test_the_corpus_is_as_large_as_it_says() -> None:
    parts = (WEIGHTS, CONFIGS, PATHS, REPOSITORIES, BODIES, FIELDS)
    assert sum(map(len, parts)) >= 300


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(hostile: tuple[httpx2.Client, Path], name: str) -> None:
    http, root = hostile
    folder = root / "broken"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((root / "tiny" / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(WEIGHTS[name])
    problem = refused(http, spec_json(model={"source": "path", "path": "models/broken"}))
    assert problem["status"] == 422


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(hostile: tuple[httpx2.Client, Path], name: str) -> None:
    http, root = hostile
    folder = root / "odd"
    folder.mkdir(exist_ok=True)
    config = json.loads((root / "tiny" / "config.json").read_text()) | CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights.hardlink_to(root / "tiny" / "model.safetensors")
    model = {"source": "path", "path": "models/odd"}
    problem = refused(http, spec_json(model=model))
    assert problem["status"] == 422


@pytest.mark.parametrize("number", range(len(PATHS)))
def test_paths(hostile: tuple[httpx2.Client, Path], number: int) -> None:
    http, _ = hostile
    problem = refused(http, spec_json(model={"source": "path", "path": PATHS[number]}))
    assert problem["status"] == 422


@pytest.mark.parametrize("number", range(len(REPOSITORIES)))
def test_repositories(hostile: tuple[httpx2.Client, Path], number: int) -> None:
    http, _ = hostile
    model = {"source": "hub", "repo_id": REPOSITORIES[number]}
    assert refused(http, spec_json(model=model))["status"] == 422


@pytest.mark.parametrize("name", BODIES)
def test_bodies(hostile: tuple[httpx2.Client, Path], name: str) -> None:
    http, _ = hostile
    assert refused(http, None, raw=BODIES[name])["status"] in (400, 422)


@pytest.mark.parametrize("name", FIELDS)
def test_fields(hostile: tuple[httpx2.Client, Path], name: str) -> None:
    http, _ = hostile
    assert refused(http, spec_json() | FIELDS[name])["status"] == 422
