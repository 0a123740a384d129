"""Hostile and broken models are refused by the API within seconds, and nothing stays behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from finished import Stack, spec_json

Damage = Callable[[Path], None]


def _header(path: Path) -> tuple[bytes, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + length], data[8 + length :]


def _rewrite(path: Path, header: bytes, rest: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + rest)


def truncated_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    header, _ = _header(file)
    _rewrite(file, header[: len(header) // 2], b"", len(header))


def oversized_header(folder: Path) -> None:
    header, rest = _header(folder / "model.safetensors")
    _rewrite(folder / "model.safetensors", header, rest, 1 << 40)


def duplicate_keys(folder: Path) -> None:
    file = folder / "model.safetensors"
    header, rest = _header(file)
    name = next(n for n in json.loads(header) if n != "__metadata__")
    entry = json.dumps({name: json.loads(header)[name]})[1:-1].encode()
    _rewrite(file, header.rstrip()[:-1] + b"," + entry + b"}", rest)


def cut_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def endless_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "../evil"}))


def weights_outside(folder: Path) -> None:
    file = folder / "model.safetensors"
    outside = folder.parent.parent / f"{folder.name}-outside.safetensors"
    file.rename(outside)
    file.symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (truncated_header, "header"),
        (oversized_header, "header"),
        (duplicate_keys, "twice"),
        (cut_file, "model.safetensors"),
        (pickle_only, "pytorch_model.bin"),
        (no_weights, "safetensors"),
        (no_config, "config.json"),
        (endless_config, "num_hidden_layers"),
        (unknown_architecture, "model_type"),
        (weights_outside, "symbolic link"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_model_is_refused_by_name(
    http: httpx2.Client, stack: Stack, models: Path, damage: Damage, word: str
) -> None:
    folder = models / damage.__name__
    shutil.copytree(models / "tiny", folder)
    damage(folder)
    data = stack.context.settings.data
    before = (sum(stack.context.jobs.counts().values()), _folders(data))
    body = spec_json(model={"source": "path", "path": f"models/{folder.name}"})
    for query in ("", "?validate_only=true"):
        answer = http.post(f"/v1/jobs{query}", json=body)
        assert answer.status_code == 422, answer.text
        assert word in answer.json()["detail"]
        assert str(models) not in answer.text
    assert (sum(stack.context.jobs.counts().values()), _folders(data)) == before


def test_folder_behind_a_symbolic_link_is_not_allowed(
    http: httpx2.Client, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (models / "link").symlink_to(tmp_path / "elsewhere")
    body = spec_json(model={"source": "path", "path": "models/link"})
    answer = http.post("/v1/jobs", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "path_not_allowed")
    assert str(tmp_path) not in answer.text


def test_wrong_gguf_is_refused(http: httpx2.Client, models: Path) -> None:
    folder = models / "gguf"
    folder.mkdir()
    (folder / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    model = {"source": "path", "path": "models/gguf", "file": "bad.gguf"}
    answer = http.post("/v1/jobs", json=spec_json(model=model))
    assert answer.status_code == 422
    assert "bad.gguf" in answer.json()["detail"]
    missing = http.post("/v1/jobs", json=spec_json(model=model | {"file": "none.gguf"}))
    assert missing.json()["code"] == "file_not_found"


def _folders(data: Path) -> list[str]:
    return sorted(p.name for name in ("jobs", "artifacts") for p in (data / name).glob("*"))


LONG_PATHS = {
    "a part of 300": "models/" + "a" * 300,
    "the first part over the limit": "models/" + "a" * 256,
    "two bytes a character": "models/" + "\u00e9" * 128,
    "a long part in the middle": "models/" + "a" * 3000 + "/tiny",
    "many parts": "models/" + "a/" * 2000 + "a",
    "a long part behind a real one": "models/tiny/" + "b" * 256,
    "below a file": "models/tiny/config.json/" + "b" * 300,
}


@pytest.mark.parametrize("path", LONG_PATHS.values(), ids=LONG_PATHS.keys())
@pytest.mark.parametrize("query", ["", "?validate_only=true"])
def test_paths_that_no_file_system_holds_are_not_found(
    http: httpx2.Client, path: str, query: str
) -> None:
    text = {"text": {"source": "file", "path": path}}
    given = {"resume_parameters": {"source": "path", "path": path}}
    learned = {"method": "omniquant", "omniquant": given}
    expected = {
        "model_not_found": {"model": {"source": "path", "path": path}},
        "text_not_found": {"calibration": text},
        "parameters_not_found": {"refinement": learned},
    }
    for code, changes in expected.items():
        answer = http.post(f"/v1/jobs{query}", json=spec_json(**changes))
        assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text


def test_a_long_name_of_a_gguf_file_is_not_found(http: httpx2.Client) -> None:
    for name in ("a" * 300 + ".gguf", "\u00e9" * 200 + ".gguf"):
        model = {"source": "path", "path": "models/tiny", "file": name}
        answer = http.post("/v1/jobs", json=spec_json(model=model))
        assert (answer.status_code, answer.json()["code"]) == (422, "file_not_found")
