"""The smallest map within a predicted loss."""

import pytest

from bitmill.allocation.allocator import Allocator
from bitmill.config.quantization import DEFAULT_WIDTHS as WIDTHS
from bitmill.config.quantization import Allocation, Budget
from bitmill.formats.accounting import measure
from plans import llama_plan, random_profile


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_nothing_smaller_is_within_it(share):
    plan = llama_plan()
    profile = random_profile(plan, WIDTHS)
    allocator = Allocator(plan, Allocation(order="natural"), profile)
    worst = profile.predicted_loss(allocator.uniform(Budget(bits=2.5)).linears)
    found = allocator.map(Budget(max_loss_increase=share * worst))
    loss = profile.predicted_loss(found.linears)
    assert loss <= share * worst
    bits = measure(plan, found.linears, found.order, "bits") * 8 / plan.weights
    smaller = allocator.map(Budget(bits=bits * 0.999))
    assert profile.predicted_loss(smaller.linears) > share * worst


def test_what_no_map_reaches_gives_the_best():
    plan = llama_plan()
    profile = random_profile(plan, WIDTHS)
    allocator = Allocator(plan, Allocation(order="natural"), profile)
    found = allocator.map(Budget(max_loss_increase=1e-30))
    assert {width for widths in found.linears.values() for width in widths} == {8}
