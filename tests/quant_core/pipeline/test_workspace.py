"""Stages are skipped, resumed and redone exactly when their inputs say so."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from bitmill.errors import Cancelled
from bitmill.pipeline.progress import Progress, StageName
from bitmill.pipeline.stage import Run, Stage
from bitmill.pipeline.work_folder import is_of_shared_stages
from bitmill.pipeline.workspace import Made, Turns, Workspace
from stores import wait_for


class Watcher:
    def __init__(self) -> None:
        self.events: list[Progress] = []
        self.stop = False

    def workspace(self, root: Path) -> Workspace:
        return Workspace(root, self.events.append, lambda: self.stop)

    @property
    def states(self) -> list[str | None]:
        return [event.state for event in self.events if event.kind == "stage"]


@dataclass(frozen=True)
class Inputs:
    a: int


def run(
    space: Workspace, name: StageName, a: int, do: Callable[[Path], object], version: int = 1
) -> Made:
    def work(inputs: Inputs, run: Run, folder: Path) -> None:
        do(folder)

    return space.run(Stage(name, work, version), Inputs(a))


def put(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("x")


def test_same_inputs_are_skipped_and_others_replace(tmp_path: Path) -> None:
    watcher = Watcher()
    space = watcher.workspace(tmp_path)
    first = run(space, "plan", 1, put("one"))
    assert run(space, "plan", 1, put("never")) == first
    assert watcher.states == ["started", "finished", "skipped"]
    second = run(space, "plan", 2, put("two"))
    assert sorted(p.name for p in second.folder.iterdir()) == ["stage.json", "two"]
    assert second != first
    assert set(space.seconds()) == {"plan"}


def test_a_later_version_of_the_code_makes_it_anew(tmp_path: Path) -> None:
    space = Watcher().workspace(tmp_path)
    run(space, "plan", 1, put("one"))
    assert (run(space, "plan", 1, put("two"), version=2).folder / "two").exists()


def test_a_folder_that_was_lost_is_another_making(tmp_path: Path) -> None:
    space = Watcher().workspace(tmp_path)
    first = run(space, "plan", 1, put("one"))
    space.forget("plan")
    assert run(space, "plan", 1, put("one")) != first


def test_stages_of_other_runs_do_not_count(tmp_path: Path) -> None:
    run(Watcher().workspace(tmp_path), "profile", 1, put("one"))
    space = Watcher().workspace(tmp_path)
    run(space, "plan", 1, put("one"))
    assert set(space.seconds()) == {"plan"}


def test_a_failed_stage_goes_on_where_it_was_with_the_same_inputs_only(tmp_path: Path) -> None:
    space = Watcher().workspace(tmp_path)

    def fails(folder: Path) -> None:
        (folder / "block-0").write_text("done")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(space, "refine", 1, fails)
    assert not (tmp_path / "refine").exists()
    seen: list[bool] = []
    run(space, "refine", 1, lambda folder: seen.append((folder / "block-0").exists()))
    assert seen == [True]
    with pytest.raises(RuntimeError):
        run(space, "refine", 2, fails)
    run(space, "refine", 3, lambda folder: seen.append((folder / "block-0").exists()))
    assert seen == [True, False]


def test_a_stop_is_seen_before_a_stage_and_between_units(tmp_path: Path) -> None:
    watcher = Watcher()
    space = watcher.workspace(tmp_path)
    watcher.stop = True
    with pytest.raises(Cancelled):
        run(space, "plan", 1, put("never"))
    with pytest.raises(Cancelled):
        space.unit("refine", 1, 2, "block")
    assert (watcher.events[-1].done, watcher.events[-1].total) == (1, 2)
    assert not (tmp_path / "plan").exists()


def jobs_of_one_sweep(folder: Path, count: int) -> tuple[list[Watcher], list[Workspace]]:
    watchers = [Watcher() for _ in range(count)]
    spaces = [
        Workspace(
            folder / f"job-{i}",
            watcher.events.append,
            lambda watcher=watcher: watcher.stop,  # type: ignore[misc]
            shared=folder / "shared",
        )
        for i, watcher in enumerate(watchers)
    ]
    return watchers, spaces


def test_jobs_of_a_sweep_make_equal_stages_once(tmp_path: Path) -> None:
    (one, two), (first, second) = jobs_of_one_sweep(tmp_path, 2)
    made = run(first, "profile", 1, put("one"))
    assert run(second, "profile", 1, put("never")) == made
    assert made.folder.name not in ("profile", "job-0")
    assert run(second, "profile", 2, put("two")) != made
    assert run(first, "profile", 1, put("never")) == made
    assert one.states == ["started", "finished", "skipped"]
    assert two.states == ["skipped", "started", "finished"]
    assert second.seconds().keys() == {"profile"}
    assert all(is_of_shared_stages(path.name) for path in (tmp_path / "shared").iterdir())


class Sending:
    """Hands turns out in memory and copies what was made from one folder to the other."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self.holder: dict[str, Path] = {}
        self.done: set[str] = set()

    def of(self, folder: Path) -> Turns:
        return Turn(self, folder)


@dataclass(frozen=True)
class Turn:
    sending: Sending
    folder: Path

    def take(self, stage: str) -> bool:
        if stage in self.sending.done:
            shutil.copytree(self.sending.holder[stage] / stage, self.folder / stage)
            return True
        return self.sending.holder.setdefault(stage, self.folder) == self.folder

    def made(self, stage: str) -> None:
        self.sending.done.add(stage)


@pytest.mark.parametrize("travels", [True, False])
def test_a_stage_that_travels_is_made_once_though_folders_differ(
    tmp_path: Path, travels: bool
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    sending, watchers = Sending(folders), [Watcher(), Watcher()]
    first, second = (
        Workspace(
            folder / "job",
            watcher.events.append,
            lambda: False,
            shared=folder / "shared",
            turns=sending.of(folder / "shared"),
        )
        for folder, watcher in zip(folders, watchers, strict=True)
    )
    begun, go_on = threading.Event(), threading.Event()

    def slowly(inputs: Inputs, run: Run, folder: Path) -> None:
        begun.set()
        assert go_on.wait(60)

    stage = Stage("profile", slowly, travels=travels)
    with ThreadPoolExecutor(2) as pool:
        made = pool.submit(first.run, stage, Inputs(1))
        assert begun.wait(60)
        begun.clear()
        taken = pool.submit(second.run, stage, Inputs(1))
        if not travels:
            assert begun.wait(60)
        go_on.set()
        assert (taken.result(20) == made.result(20)) is travels
    assert watchers[0].states == ["started", "finished"]
    assert watchers[1].states == (["skipped"] if travels else ["started", "finished"])
    assert len(list(folders[1].glob("shared/profile-*"))) == 1


def test_what_is_published_is_a_jobs_own(tmp_path: Path) -> None:
    _, (first, second) = jobs_of_one_sweep(tmp_path, 2)
    assert run(first, "publish", 1, put("one")) != run(second, "publish", 1, put("two"))


def test_a_job_goes_on_where_another_of_the_sweep_was_stopped(tmp_path: Path) -> None:
    _, (first, second) = jobs_of_one_sweep(tmp_path, 2)

    def fails(folder: Path) -> None:
        (folder / "block-0").write_text("done")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(first, "refine", 1, fails)
    seen: list[bool] = []
    run(second, "refine", 1, lambda folder: seen.append((folder / "block-0").exists()))
    assert seen == [True]


def test_a_job_waits_while_another_makes_the_same(tmp_path: Path) -> None:
    (_, waiting), (first, second) = jobs_of_one_sweep(tmp_path, 2)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(folder: Path) -> None:
        begun.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        made = pool.submit(run, first, "profile", 1, slowly)
        assert begun.wait(60)
        taken = pool.submit(run, second, "profile", 1, put("never"))
        wait_for(lambda: waiting.events, "the second job to say that it waits")
        assert not taken.done()
        go_on.set()
        assert taken.result(20) == made.result(20)
    assert [event.message for event in waiting.events] == ["made by another job of the sweep", None]
    assert waiting.states == ["skipped"]


def test_a_job_that_waits_can_be_stopped(tmp_path: Path) -> None:
    (_, waiting), (first, second) = jobs_of_one_sweep(tmp_path, 2)

    def meanwhile(folder: Path) -> None:
        waiting.stop = True
        with pytest.raises(Cancelled):
            run(second, "profile", 1, put("never"))

    run(first, "profile", 1, meanwhile)
