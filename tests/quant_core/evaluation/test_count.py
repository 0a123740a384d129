"""One count over all parts of an evaluation."""

from __future__ import annotations

import torch

from bitmill.evaluation.count import Count, windows_read


def test_parts_follow_each_other_and_none_goes_back() -> None:
    told: list[tuple[int, int, str, str]] = []
    count = Count(lambda *now: told.append(now), 10, "step")
    blocks, windows = count.part(4, "baseline"), count.part(6, "source on wiki")
    blocks(1, 2)
    windows(1, 4)  # whatever the part before has told
    windows(4, 4)
    assert told == [
        (2, 10, "step", "baseline"),
        (5, 10, "step", "source on wiki"),
        (10, 10, "step", "source on wiki"),
    ]


def test_windows_are_those_of_all_texts_and_models() -> None:
    texts = {"a": torch.zeros(3, 8), "b": torch.zeros(2, 8)}
    assert windows_read(texts, 4) == 20
    assert windows_read({}, 4) == 0
