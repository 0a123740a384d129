"""Files and folders appear whole or not at all."""

import errno
import json
import resource
import subprocess
import sys
from queue import Queue
from threading import Event

import pytest

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.errors import FormatError, ResourceError
from bitmill.io.atomic import (
    Flusher,
    atomic_folder,
    disk_errors,
    read_json,
    sha256_file,
    sha256_json,
    write_bytes,
    write_json,
)
from bitmill.results import QualityReport


def test_a_failed_folder_leaves_nothing(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_by_the_name_that_the_folder_would_have(tmp_path):
    with (
        pytest.raises(ResourceError, match="no space is left while out is written"),
        atomic_folder(tmp_path / "out") as folder,
        disk_errors(folder),
    ):
        raise OSError(errno.ENOSPC, "full")


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "out"
    for name in ("a", "b"):
        with atomic_folder(target) as folder:
            (folder / name).write_text(name)
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "read", [read_json, QualityReport.load, BitWidthMap.load], ids=["json", "report", "map"]
)
def test_a_file_that_is_not_there_is_named_with_its_folder(tmp_path, read):
    with pytest.raises(FormatError, match=rf"^{tmp_path.name} holds no a\.json"):
        read(tmp_path / "a.json")
    with pytest.raises(FormatError, match=r"^there is no folder mistyped, and so no a\.json in it"):
        read(tmp_path / "mistyped" / "a.json")
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match=r"^there is no folder file, and so no a\.json in it"):
        read(tmp_path / "file" / "a.json")


def test_json_round_trip_and_damage(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": [1.5, None]})
    assert read_json(tmp_path / "x.json") == {"b": 1, "a": [1.5, None]}
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(FormatError, match=r"y\.json"):
        read_json(tmp_path / "y.json")
    with pytest.raises(FormatError, match=r"none\.json") as missing:
        read_json(tmp_path / "none.json")
    assert str(tmp_path) not in missing.value.message


def test_digests_do_not_depend_on_key_order(tmp_path):
    assert sha256_json({"a": 1, "b": 2}) == sha256_json(json.loads('{"b": 2, "a": 1}'))
    write_bytes(tmp_path / "f", b"abc")
    assert sha256_file(tmp_path / "f").startswith("ba7816bf")


def test_a_file_is_flushed_while_it_is_written(tmp_path, monkeypatch):
    flushed = Queue()
    monkeypatch.setattr("bitmill.io.atomic.os.fsync", flushed.put)
    with (tmp_path / "f").open("wb") as file, Flusher(every=100) as flusher:
        flusher.wrote(file, 99)
        flusher.wrote(file, 1)
        assert flushed.get(timeout=60) == file.fileno()
        flusher.wrote(file, 50)
    assert flushed.empty()


def test_flushes_that_are_asked_for_during_one_become_one(tmp_path, monkeypatch):
    began, go_on, count = Event(), Event(), []

    def fsync(number):
        count.append(number)
        began.set()
        assert go_on.wait(60)

    monkeypatch.setattr("bitmill.io.atomic.os.fsync", fsync)
    with (tmp_path / "f").open("wb") as file, Flusher(every=1) as flusher:
        flusher.wrote(file, 1)
        assert began.wait(60)
        for _ in range(5):
            flusher.wrote(file, 1)
        go_on.set()
    assert len(count) == 1


def test_what_goes_wrong_in_a_flush_is_raised(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError("the disk is gone")

    monkeypatch.setattr("bitmill.io.atomic.os.fsync", fsync)
    file = (tmp_path / "f").open("wb")
    with file, pytest.raises(OSError, match="is gone"), Flusher(every=1) as flusher:
        flusher.wrote(file, 1)


def test_a_file_over_the_size_limit_is_a_resource_error_and_leaves_nothing(tmp_path):
    script = (
        "import resource, signal, sys; from pathlib import Path; from bitmill.io.atomic import *;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "write_bytes(Path(sys.argv[1]) / 'big', b'x' * 5000)"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert ResourceError.__name__ in done.stderr
    assert list(tmp_path.iterdir()) == []
