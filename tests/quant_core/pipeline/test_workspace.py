"""Stages are skipped, resumed and redone exactly when their inputs say so."""

import pytest

from bitmill.errors import Cancelled
from bitmill.pipeline.workspace import Workspace


class Watcher:
    def __init__(self):
        self.events, self.stop = [], False

    def workspace(self, root):
        return Workspace(root, self.events.append, lambda: self.stop)

    @property
    def states(self):
        return [event.state for event in self.events if event.kind == "stage"]


def put(name, text="x"):
    return lambda folder: (folder / name).write_text(text)


def test_same_inputs_are_skipped_and_others_replace(tmp_path):
    watcher = Watcher()
    space = watcher.workspace(tmp_path)
    space.run("plan", {"a": 1}, put("one"))
    space.run("plan", {"a": 1}, put("never"))
    assert watcher.states == ["started", "finished", "skipped"]
    folder = space.run("plan", {"a": 2}, put("two"))
    assert sorted(p.name for p in folder.iterdir()) == ["stage.json", "two"]
    assert set(space.seconds()) == {"plan"}


def test_a_failed_stage_goes_on_where_it_was_with_the_same_inputs_only(tmp_path):
    space = Watcher().workspace(tmp_path)

    def fails(folder):
        (folder / "block-0").write_text("done")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        space.run("refine", {"a": 1}, fails)
    assert not (tmp_path / "refine").exists()
    seen = []
    space.run("refine", {"a": 1}, lambda folder: seen.append((folder / "block-0").exists()))
    assert seen == [True]
    with pytest.raises(RuntimeError):
        space.run("refine", {"a": 2}, fails)
    space.run("refine", {"a": 3}, lambda folder: seen.append((folder / "block-0").exists()))
    assert seen == [True, False]


def test_a_stop_is_seen_before_a_stage_and_between_units(tmp_path):
    watcher = Watcher()
    space = watcher.workspace(tmp_path)
    watcher.stop = True
    with pytest.raises(Cancelled):
        space.run("plan", {}, put("never"))
    with pytest.raises(Cancelled):
        space.unit("refine", 1, 2, "block")
    assert (watcher.events[-1].done, watcher.events[-1].total) == (1, 2)
    assert not (tmp_path / "plan").exists()
