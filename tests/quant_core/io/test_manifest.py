"""A published folder's list of files is complete, readable by sha256sum, and catches any change."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bitmill.errors import FormatError, VerificationError
from bitmill.io.manifest import Manifest, check_folder, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "note.txt").write_text("x")
    write_manifest(tmp_path)
    return tmp_path


def test_every_file_is_listed_with_size_and_digest(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert list(manifest.files) == ["below/note.txt", "config.json", "model.safetensors"]
    for path, entry in manifest.files.items():
        data = (folder / path).read_bytes()
        assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest.total_bytes == 1 + 2 + 1_280_000
    assert check_folder(folder) == manifest


def test_the_stored_form_is_stable(folder: Path) -> None:
    stored = json.loads((folder / "MANIFEST.json").read_text())
    assert stored.keys() == {"schema_version", "files"}
    assert stored["schema_version"] == 1
    assert stored["files"]["config.json"] == {
        "size": 2,
        "sha256": hashlib.sha256(b"{}").hexdigest(),
    }


def test_sha256sum_accepts_the_sums(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4


def test_writing_again_changes_nothing(folder: Path) -> None:
    before = [(folder / name).read_bytes() for name in ("MANIFEST.json", "SHA256SUMS")]
    write_manifest(folder)
    assert [(folder / name).read_bytes() for name in ("MANIFEST.json", "SHA256SUMS")] == before


def _flip_last_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _link(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "below" / "note.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "new.txt").write_text(""), r"new\.txt is not in MANIFEST\.json"),
        (lambda f: (f / "config.json").write_text("{}\n"), r"config\.json has 3 bytes"),
        (_flip_last_byte, r"model\.safetensors has another SHA-256"),
        (_link, r"config\.json is a symbolic link"),
    ],
)
def test_any_change_is_refused_by_name(
    folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    with pytest.raises(VerificationError, match=message):
        check_folder(folder)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../b", "a//b", "", "a\\b", "a\nb", "./a"]
)
def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path, path: str) -> None:
    entry = {"size": 0, "sha256": "0" * 64}
    stored = {"schema_version": 1, "files": {path: entry}}
    (tmp_path / "MANIFEST.json").write_text(json.dumps(stored))
    with pytest.raises(FormatError, match="not a plain relative path"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 2, "files": {}}', '{"x": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "MANIFEST.json").write_text(text)
    with pytest.raises(FormatError, match=r"MANIFEST\.json cannot be read"):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"MANIFEST\.json cannot be read"):
        check_folder(tmp_path)


def test_json_round_trip(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
