"""The benchmark measures both models and divides in the right direction."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitmill.errors import InputError
from bitmill.inference.bench import bench
from tiny import tiny_llama, tiny_opt
from weights import pack_model


def test_both_models_are_measured_and_compared(tmp_path: Path) -> None:
    packed = pack_model(tiny_llama(tmp_path / "source"), tmp_path / "packed")
    result = bench(packed.folder, prompt_tokens=12, new_tokens=3)
    for name in ("packed", "dense"):
        assert result[name]["prefill_tokens_per_second"] > 0
        assert result[name]["decode_tokens_per_second"] > 0
        assert result[name]["peak_bytes"] > 10_000_000
        assert result[name]["graph"] is False
    rates = [result[name]["decode_tokens_per_second"] for name in ("packed", "dense")]
    assert result["decode_speedup"] == pytest.approx(rates[0] / rates[1])


def test_a_benchmark_of_no_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 prompt and 4 new tokens"):
        bench(tmp_path, prompt_tokens=0, new_tokens=4)


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    source = tiny_opt(tmp_path / "source", max_position_embeddings=16)
    packed = pack_model(source, tmp_path / "packed").folder
    assert bench(packed, prompt_tokens=12, new_tokens=3)["packed"]
    with pytest.raises(InputError, match="is 17; the model has 16 positions"):
        bench(packed, prompt_tokens=13, new_tokens=3)
