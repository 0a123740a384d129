"""Blocks that a search keeps for stage `refine`."""

import pytest

from bitmill.refinement.kept_blocks import KEY_NAME, KeptBlocks


@pytest.fixture
def kept(tmp_path):
    return KeptBlocks(tmp_path / "kept")


def blocks(folder, text):
    (folder / "tuned").mkdir(parents=True)
    (folder / "block-00000.json").write_text(text)
    (folder / "tuned" / "block-00000.json").write_text(text)
    return folder


def test_the_last_blocks_of_a_key_are_taken_once(kept, tmp_path):
    kept.keep(blocks(tmp_path / "a", "first"), "1")
    kept.keep(blocks(tmp_path / "b", "second"), "2")
    target = tmp_path / "target"
    target.mkdir()
    assert not kept.take("1", target)
    assert kept.take("2", target)
    assert sorted(path.name for path in target.iterdir()) == ["block-00000.json", "tuned"]
    assert (target / "tuned" / "block-00000.json").read_text() == "second"
    assert not kept.take("2", target)
    assert not (tmp_path / "a").exists()


def test_taking_goes_on_where_it_was_killed(kept, tmp_path):
    kept.keep(blocks(tmp_path / "a", "text"), "1")
    target = tmp_path / "target"
    target.mkdir()
    (kept.folder / "block-00000.json").rename(target / "block-00000.json")
    assert kept.take("1", target)
    assert (target / "tuned" / "block-00000.json").is_file()
    assert not kept.folder.exists()


def test_blocks_without_a_key_are_no_blocks(kept, tmp_path):
    kept.keep(blocks(tmp_path / "a", "text"), "1")
    (kept.folder / KEY_NAME).unlink()
    assert not kept.take("1", tmp_path)
