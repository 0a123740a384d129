"""Memory tiers."""

from __future__ import annotations

import pytest

from bitmill.errors import ModelError
from bitmill_workers.settings import TIERS, Settings
from bitmill_workers.tiers import choose_queue, next_tier, tier_bytes


def test_job_goes_to_the_smallest_tier_that_holds_it() -> None:
    settings = Settings(route_by_memory=True)
    assert choose_queue(1, settings) == "gpu-24"
    assert choose_queue(tier_bytes("gpu-24"), settings) == "gpu-24"
    assert choose_queue(tier_bytes("gpu-24") + 1, settings) == "gpu-48"
    with pytest.raises(ModelError, match="largest tier"):
        choose_queue(10**12, settings)


def test_everything_waits_in_one_queue_by_default() -> None:
    assert choose_queue(10**12, Settings()) == "cpu"


def test_tiers_ascend_and_end() -> None:
    assert [next_tier(t) for t in TIERS] == [*TIERS[1:], None]
    assert [tier_bytes(t) for t in TIERS] == sorted(tier_bytes(t) for t in TIERS)
