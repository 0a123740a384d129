"""Blocks loaded ahead are the blocks asked for, in any order, and errors are not lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from bitmill.config.quantization import parse_config
from bitmill.errors import ModelError
from bitmill.models.prefetch import BlockPrefetcher
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.plan.model_plan import make_plan
from tiny import tiny_llama

SPEC = parse_config({"budget": {"code_bits": 3}})


class Loader:
    """Makes modules that know their index and records who loaded them."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.loads: list[tuple[int, bool]] = []

    def __call__(self, i: int) -> nn.Module:
        aside = threading.current_thread() is not threading.main_thread()
        self.loads.append((i, aside))
        if i == self.broken:
            raise ModelError(f"block {i} is damaged")
        module = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            module.weight.fill_(i)
        return module


def prefetcher(loader: Loader) -> BlockPrefetcher:
    return BlockPrefetcher(loader, 5, torch.device("cpu"))


def index_of(module: nn.Module) -> int:
    return int(weight_of(module).item())


@pytest.mark.parametrize(
    "walk",
    [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 0, 1, 1, 2, 2], [3, 0, 4, 4, 3, 3, 2, 0, 1], [2]],
    ids=["forward", "backward", "twice each", "jumps", "one"],
)
def test_any_walk_gets_its_blocks(walk: list[int]) -> None:
    ahead = prefetcher(Loader())
    modules = [ahead.get(i) for i in walk]
    assert [index_of(module) for module in modules] == walk
    assert len({id(module) for module in modules}) == len(walk)
    ahead.close()


@pytest.mark.parametrize("walk", [[0, 1, 2, 3, 4], [3, 2, 1, 0]])
def test_a_straight_walk_loads_each_block_once_ahead(walk: list[int]) -> None:
    loader = Loader()
    ahead = prefetcher(loader)
    for i in walk:
        ahead.get(i)
    ahead.close()
    turned = [i for i, _ in loader.loads if i not in walk]
    assert sorted(i for i, _ in loader.loads if i in walk) == sorted(walk)
    assert len(turned) <= 1
    assert all(aside for i, aside in loader.loads if i not in walk[:2])


def test_an_error_ahead_is_raised_when_its_block_is_asked_for() -> None:
    ahead = prefetcher(Loader(broken=2))
    assert index_of(ahead.get(0)) == 0
    assert index_of(ahead.get(1)) == 1
    with pytest.raises(ModelError, match="block 2 is damaged"):
        ahead.get(2)
    assert index_of(ahead.get(3)) == 3
    ahead.close()


def test_streamed_models_load_the_same_blocks_ahead(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", num_hidden_layers=4)
    plan = make_plan(folder, SPEC)
    cpu = torch.device("cpu")
    plain = StreamedModel(folder, plan, device=cpu, dtype=torch.float32)
    ahead = StreamedModel(folder, plan, device=cpu, dtype=torch.float32, prefetch=True)
    with torch.inference_mode():
        for i in (0, 1, 2, 3, 3, 2, 1, 0):
            expected = dict(plain.load_block(i).named_parameters())
            loaded = dict(ahead.load_block(i).named_parameters())
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)
            assert not any(p.is_inference() for p in loaded.values())
    ahead.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_loaded_on_another_stream_survive_reuse_of_memory(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", num_hidden_layers=6, hidden_size=1280, head_dim=320)
    plan = make_plan(folder, SPEC)
    device = torch.device("cuda")
    plain = StreamedModel(folder, plan, device=device, dtype=torch.float32, prefetch=False)
    ahead = StreamedModel(folder, plan, device=device, dtype=torch.float32)
    tokens = torch.arange(2, 200, device=device)[None]
    with torch.no_grad():
        for _ in range(3):
            first, second = plain.embed(tokens), ahead.embed(tokens)
            for i in range(6):
                first = plain.run_block(i, plain.load_block(i), first)
                second = ahead.run_block(i, ahead.load_block(i), second)
            assert torch.equal(first, second)
    ahead.close()
