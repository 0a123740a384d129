from __future__ import annotations

import pytest
import torch

from bitmill.calibration.block_inputs import (
    BlockInputs,
    HostMemory,
    choose_every,
    least_inputs,
)
from bitmill.errors import ResourceError

BLOCKS = 7


@pytest.mark.parametrize(
    ("limit", "every"),
    [(100, 1), (30, 1), (29, 2), (16, 2), (12, 3), (11, 4), (10, 5), (9, 5), (0, 5)],
)
def test_every_is_the_smallest_that_fits(limit, every):
    assert choose_every(30, 1, limit) == every


def test_resident_inputs_stay_within_the_limit():
    for blocks in (1, 2, 5, 30, 80):
        for limit in range(1, blocks + 2):
            every = choose_every(blocks, 1, limit)
            resident = -(-blocks // every) + every - 1
            smallest = min(-(-blocks // s) + s - 1 for s in range(1, blocks + 1))
            assert resident <= limit or resident == smallest


def counted_step(calls: list[int]):
    def step(i: int, x: torch.Tensor, y: torch.Tensor) -> None:
        calls.append(i)
        y.copy_(x * 2 + i)

    return step


def expected_inputs(first: torch.Tensor) -> list[torch.Tensor]:
    inputs = [first]
    for i in range(BLOCKS):
        inputs.append(inputs[-1] * 2 + i)
    return inputs


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [0, 500, 10**6])
def test_any_spacing_and_limit_gives_the_same_inputs(every, limit, tmp_path):
    calls: list[int] = []
    with HostMemory(limit, tmp_path) as memory:
        first = memory.empty((2, 3, 5), torch.float64)
        first.copy_(torch.arange(30.0).view(2, 3, 5))
        expected = expected_inputs(first.clone())
        inputs = BlockInputs(first, BLOCKS, every, memory, counted_step(calls))
        assert torch.equal(inputs.forward(), expected[-1])
        for i in reversed(range(BLOCKS)):
            assert torch.equal(inputs.take(i), expected[i])
        if limit == 0:
            assert memory.spilled == memory._files > BLOCKS
        if limit == 10**6:
            assert memory.spilled == 0
    again = len(calls) - BLOCKS
    assert again == BLOCKS - -(-BLOCKS // every)
    assert list(tmp_path.iterdir()) == []


def test_a_partial_forward_stops_where_asked(tmp_path):
    calls: list[int] = []
    with HostMemory(10**6) as memory:
        first = torch.ones(1, 1, 1, dtype=torch.float64)
        inputs = BlockInputs(first, BLOCKS, 2, memory, counted_step(calls))
        assert torch.equal(inputs.forward(3), expected_inputs(first)[3])
        assert calls == [0, 1, 2]
        assert torch.equal(inputs.take(2), expected_inputs(first)[2])


def test_memory_is_given_back():
    with HostMemory(2 * 8) as memory:
        for _ in range(5):
            kept = memory.empty((2,), torch.float64)
            memory.free(kept)
        assert memory.spilled == 0
        held = [memory.empty((1,), torch.float64) for _ in range(3)]
        assert memory.spilled == 1
        held[2].fill_(3.0)
        assert held[2].item() == 3.0


def test_what_was_given_back_last_is_handed_out_again():
    with HostMemory(3 * 16) as memory:
        one, two = (memory.empty((2,), torch.float64) for _ in range(2))
        places = [tensor.data_ptr() for tensor in (one, two)]
        memory.free(one)
        memory.free(two)
        again = memory.empty((2,), torch.float64)
        assert again.data_ptr() == places[1]
        assert memory.empty((2,), torch.float64).data_ptr() != places[1]
        assert memory.spilled == 0
        memory.free(again)
        other = memory.empty((4,), torch.float64)
        assert other.shape == (4,)
        assert memory.spilled == 0
        memory.empty((1,), torch.float64)
        assert memory.spilled == 1


def test_a_spacing_beyond_the_model_is_refused():
    with pytest.raises(ResourceError, match="every 8th of 7"):
        BlockInputs(torch.ones(1), BLOCKS, 8, HostMemory(0), counted_step([]))


def test_inputs_are_kept_where_asked(tmp_path):
    with HostMemory(16, tmp_path, torch.device("meta")) as memory:
        assert memory.empty((2,), torch.float64).device.type == "meta"
        assert memory.empty((1,), torch.float64).device.type == "cpu"
        assert memory.spilled == 1


def test_an_accelerator_without_room_leaves_inputs_to_the_host():
    assert [least_inputs(blocks) for blocks in (1, 7, 32, 80)] == [1, 5, 11, 17]
    assert choose_every(32, 1, least_inputs(32)) == 4
