"""Modes, their defaults, and learned parameters on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from bitmill.block_learning import learn_block
from bitmill.blocks import weight_of
from bitmill.errors import FormatError
from bitmill.omniquant import LearningSettings, load_learned, restore, save_learned
from bitmill.spec import OmniQuant
from learning import block_data, starts, tiny

CPU = torch.device("cpu")


def source() -> dict[str, Tensor]:
    model = tiny().model
    return {n: weight_of(m) for n, m in model.linears(model.load_block(0), 0).items()}


@pytest.mark.parametrize("mode", ["clipping", "scales", "rounding"])
def test_restoring_learned_parameters_gives_the_same_bytes(
    mode: Literal["clipping", "scales", "rounding"], tmp_path: Path
) -> None:
    model = tiny().model
    start = starts(0, (1, 3), order=True, clip=mode != "clipping")
    chosen = replace(LearningSettings.of_mode(mode), epochs=3, batch=2)
    learned = learn_block(model, 0, model.load_block(0), start, block_data(), chosen, seed=0)
    assert learned.report.kept == "learned"
    save_learned(tmp_path / "block.safetensors", learned.tensors)
    tensors = load_learned(tmp_path / "block.safetensors")
    assert any(key.endswith(".upper") for key in tensors) == (mode == "clipping")
    restored = restore(tensors, start, source(), CPU)
    for name, weight in learned.weights.items():
        assert torch.equal(restored[name].codes, weight.codes)
        assert torch.equal(restored[name].scales, weight.scales)
        assert torch.equal(restored[name].zeros, weight.zeros)
        assert torch.equal(restored[name].dequantize(), weight.dequantize())


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    start = starts(0)
    codes = {
        f"{n}.{k}": getattr(w, k) for n, w in start.items() for k in ("codes", "scales", "zeros")
    }
    name = next(iter(start))
    with pytest.raises(FormatError, match="another model"):
        restore(codes | {f"{name}.codes": codes[f"{name}.codes"][:3]}, start, source(), CPU)
    del codes[f"{name}.zeros"]
    with pytest.raises(FormatError, match=f"{name}.zeros"):
        restore(codes, start, source(), CPU)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(FormatError, match=r"block\.safetensors"):
        load_learned(path)


def test_a_job_overrides_the_defaults_of_its_mode_only_where_it_says_so() -> None:
    plain = LearningSettings.of_spec(OmniQuant(mode="clipping"))
    assert plain == LearningSettings.of_mode("clipping")
    changed = LearningSettings.of_spec(OmniQuant(mode="clipping", epochs=3, augmented_loss=True))
    assert changed == replace(plain, epochs=3, augmented_loss=True)


def test_clipping_keeps_the_published_defaults() -> None:
    chosen = LearningSettings.of_mode("clipping")
    assert (chosen.epochs, chosen.batch, chosen.clipping_rate) == (20, 1, 1e-2)
    assert chosen.block_error == "plain"
    assert not chosen.cosine
    assert chosen.descent(128).steps == 20 * 128
