"""What a user keeps in a folder that was named for a result is never touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bitmill.errors import InputError
from bitmill.io.atomic import atomic_folder
from bitmill.io.manifest import write_manifest
from bitmill.io.targets import check_apart, check_file, check_kept, check_result


def result(folder: Path) -> Path:
    """What a finished job leaves."""
    with atomic_folder(folder) as made:
        (made / "model.safetensors").write_bytes(b"weights")
        (made / "additional_chat_templates").mkdir()
        (made / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
        write_manifest(made)
    return folder


def everything(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(path for path in folder.rglob("*"))
    return {str(p): None if p.is_dir() or p.is_symlink() else p.read_bytes() for p in paths}


def extra_file(out: Path) -> str:
    (result(out) / "notes.txt").write_text("mine")
    return "notes.txt"


def extra_in_a_folder(out: Path) -> str:
    (result(out) / "additional_chat_templates" / "mine.jinja").write_text("mine")
    return "additional_chat_templates/mine.jinja"


def extra_empty_folder(out: Path) -> str:
    (result(out) / "drafts").mkdir()
    return "drafts/"


def extra_hidden_file(out: Path) -> str:
    (result(out) / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    return ".git/HEAD"


def extra_link(out: Path) -> str:
    (result(out) / "elsewhere").symlink_to(out.parent)
    return "elsewhere"


def listed_file_became_a_link(out: Path) -> str:
    (result(out) / "model.safetensors").unlink()
    (out / "model.safetensors").symlink_to("/dev/null")
    return "model.safetensors"


def own_files(out: Path) -> str:
    (out / "thesis").mkdir(parents=True)
    (out / "thesis" / "chapter1.txt").write_text("years of work")
    return "thesis"


def only_a_folder(out: Path) -> str:
    (out / "empty").mkdir(parents=True)
    return "empty"


def damaged_manifest(out: Path) -> str:
    (result(out) / "MANIFEST.json").write_text("{")
    return "MANIFEST.json"


def a_model(out: Path) -> str:
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"source")
    return "model.safetensors"


def a_file(out: Path) -> str:
    out.write_text("mine")
    return "a file of that name"


def a_link_to_a_folder(out: Path) -> str:
    result(out.parent / "real")
    out.symlink_to(out.parent / "real")
    return "a link of that name"


def a_dangling_link(out: Path) -> str:
    out.symlink_to(out.parent / "nothing")
    return "a link of that name"


REFUSED = [
    *(extra_file, extra_in_a_folder, extra_empty_folder, extra_hidden_file, extra_link),
    *(listed_file_became_a_link, own_files, only_a_folder, damaged_manifest, a_model),
    *(a_file, a_link_to_a_folder, a_dangling_link),
]


@pytest.mark.parametrize("make", REFUSED)
def test_what_is_no_result_alone_is_refused_by_name(
    make: Callable[[Path], str], tmp_path: Path
) -> None:
    named = make(tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises(InputError) as caught:
        check_result(tmp_path / "out")
    assert caught.value.code == "output_exists"
    assert named in caught.value.message
    assert everything(tmp_path) == before


def test_a_file_above_the_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        check_result(tmp_path / "file" / "below" / "out")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="does not allow it"):
        check_result(tmp_path / "out")


def absent(out: Path) -> None:
    """Nothing is there."""


def empty(out: Path) -> None:
    out.mkdir()


def incomplete(out: Path) -> None:
    (result(out) / "additional_chat_templates" / "tool.jinja").unlink()


@pytest.mark.parametrize("make", [absent, empty, result, incomplete])
def test_nothing_and_an_earlier_result_are_replaced_without_asking(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "out")
    check_result(tmp_path / "out")


def named(name: str) -> bool:
    return name in ("plan", "refine")


def test_a_kept_folder_holds_what_is_kept_there(tmp_path: Path) -> None:
    check_kept(tmp_path / "work", named, param="work")
    for name in ("plan", "refine", ".plan.bitmill-partial"):
        (tmp_path / "work" / name).mkdir(parents=True)
    check_kept(tmp_path / "work", named, param="work")
    (tmp_path / "link").symlink_to(tmp_path / "work")
    check_kept(tmp_path / "link", named, param="work")


@pytest.mark.parametrize("name", ["notes.txt", ".git", "Plan", "plan.txt", ".bitmill-partial.txt"])
def test_a_kept_folder_with_anything_else_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="which Bitmill did not write") as caught:
        check_kept(tmp_path, named, param="work")
    assert caught.value.param == "work"


@pytest.mark.parametrize(
    ("out", "how"),
    [("m", "is"), ("m/out", "lies in"), (".", "holds"), ("m/../m/x/y", "lies in"), ("link", "is")],
)
def test_folders_of_a_run_lie_apart(
    out: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to("m")
    with pytest.raises(InputError, match=f"out {out} {how} the source m") as caught:
        check_apart({"the source": Path("m"), "work": None, "out": Path(out)})
    assert caught.value.code == "overlapping_folders"


def test_neighbours_are_apart(tmp_path: Path) -> None:
    folders = {"the source": tmp_path / "m", "out": tmp_path / "mm", "work": tmp_path / "m.work"}
    check_apart(folders)


@pytest.mark.parametrize("name", ["out", "x" * 250, "é" * 120])
def test_what_a_crash_leaves_is_gone_after_the_next_write(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / name) as folder:
        partial = folder.name
        raise RuntimeError
    (tmp_path / partial).mkdir()
    (tmp_path / partial / "half").write_text("x")
    with atomic_folder(tmp_path / name) as folder:
        (folder / "whole").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def text_file(path: Path) -> str:
    path.write_text("mine")
    return "a file of that name"


def a_folder(path: Path) -> str:
    path.mkdir()
    return "something else of that name"


def a_link_to_an_own_file(path: Path) -> str:
    path.with_name("other").write_bytes(b"ours")
    path.symlink_to(path.with_name("other"))
    return "something else of that name"


def a_pipe(path: Path) -> str:
    os.mkfifo(path)
    return "something else of that name"


def an_empty_file(path: Path) -> str:
    path.touch()
    return "a file of that name"


@pytest.mark.parametrize(
    "make", [text_file, a_folder, a_link_to_an_own_file, a_pipe, an_empty_file]
)
def test_a_file_in_the_way_is_kept(tmp_path: Path, make: Callable[[Path], str]) -> None:
    target = tmp_path / "page.html"
    problem = make(target)
    with pytest.raises(InputError, match=problem) as caught:
        check_file(target, lambda found: found == b"ours", param="html")
    assert (caught.value.code, caught.value.param) == ("output_exists", "html")


def test_a_file_of_the_same_kind_is_replaced_and_its_folder_must_be_there(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    check_file(target, lambda _: False, param="html")
    target.write_bytes(b"ours")
    check_file(target, lambda found: found == b"ours", param="html")
    with pytest.raises(InputError, match="there is no folder") as caught:
        check_file(tmp_path / "absent" / "page.html", lambda _: True, param="html")
    assert caught.value.code == "missing_folder"
