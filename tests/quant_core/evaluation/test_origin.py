"""A packed folder is measured against the model that it was made from, and no other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitmill
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.errors import FormatError, InputError
from bitmill.evaluation.origin import check_made_from
from bitmill.models.reader import CheckpointSource
from bitmill.plan.model_plan import plan_for_map
from tiny import tiny_llama, tiny_opt
from weights import PackedModel, pack_model, rounded_weight


@pytest.fixture(scope="module", params=["natural", "activation"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("origin")
    return pack_model(tiny_llama(folder / "source"), folder / "packed", order=request.param)


def check(packed: PackedModel, source: Path) -> None:
    widths = BitWidthMap.load(packed.folder / "bit_width_map.json")
    with CheckpointSource(source) as tensors:
        check_made_from(packed.folder, tensors, plan_for_map(source, widths)[1])


def edited(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_the_source_and_the_same_weights_in_another_dtype_pass(
    packed: PackedModel, tmp_path: Path
) -> None:
    check(packed, packed.source)
    check(packed, edited(packed.source, tmp_path / "half", lambda _, t: t.bfloat16()))


def test_norms_of_blocks_may_be_others_than_the_sources(
    packed: PackedModel, tmp_path: Path
) -> None:
    folded = edited(
        packed.source, tmp_path / "norms", lambda n, t: t * 3 if "layernorm" in n else t
    )
    check(packed, folded)


def another_seed(source: Path, target: Path) -> Path:
    return tiny_llama(target, seed=9)


def another_norm(source: Path, target: Path) -> Path:
    return edited(source, target, lambda n, t: t * 1.5 if n == "model.norm.weight" else t)


def another_embedding(source: Path, target: Path) -> Path:
    return edited(source, target, lambda n, t: t.flip(0) if "embed_tokens" in n else t)


def another_last_block(source: Path, target: Path) -> Path:
    return edited(source, target, lambda n, t: -t if "layers.1.self_attn.v_proj" in n else t)


def another_shape(source: Path, target: Path) -> Path:
    return tiny_llama(target, intermediate_size=80)


OTHERS = [another_seed, another_norm, another_embedding, another_last_block, another_shape]


@pytest.mark.parametrize("make", OTHERS)
def test_another_model_is_refused(
    packed: PackedModel, make: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="was not made from") as caught:
        check(packed, make(packed.source, tmp_path / "other"))
    assert caught.value.code == "other_source"


def as_of_one_bit(weight: torch.Tensor, *how: Any) -> Any:
    """Weights as far from the source's as GPTQ leaves them at one bit: a cosine of 0.42."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return rounded_weight(weight + 2.2 * weight.std() * noise, *how)


def small_last_group(name: str, weight: torch.Tensor) -> torch.Tensor:
    """q_proj with next to nothing in its second group."""
    return weight * (torch.arange(160) < 128).add(0.01) if "q_proj" in name else weight


@pytest.mark.parametrize(
    "options",
    [{"cycle": (0, 8)}, {"cycle": (0, 0, 0, 0, 0, 8)}, {"cycle": (8,), "quantize": as_of_one_bit}],
)
def test_what_few_bits_leave_is_still_of_the_source(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source = edited(tiny_llama(tmp_path / "all"), tmp_path / "source", small_last_group)
    packed = pack_model(source, tmp_path / "packed", **options)
    check(packed, packed.source)
    with pytest.raises(InputError, match="was not made from"):
        check(
            packed,
            edited(source, tmp_path / "other", lambda n, t: t.flip(0) if "_proj" in n else t),
        )


def test_folded_scales_of_rows_and_columns_are_of_the_source(tmp_path: Path) -> None:
    source = edited(tiny_llama(tmp_path / "all"), tmp_path / "source", small_last_group)

    def scaled(weight: torch.Tensor, *how: Any) -> Any:
        scales = torch.where(torch.arange(weight.shape[1]) < 128, 1.0, 1e4)
        return rounded_weight(weight * scales, *how)

    packed = pack_model(source, tmp_path / "packed", cycle=(8,), quantize=scaled)
    check(packed, packed.source)
    with pytest.raises(InputError, match="was not made from"):
        check(packed, another_last_block(source, tmp_path / "other"))


def test_a_model_without_the_maps_linears_is_named(packed: PackedModel, tmp_path: Path) -> None:
    other = tiny_opt(tmp_path / "other")
    with pytest.raises(FormatError, match=r"of another model: other has no linear .*14 of"):
        bitmill.evaluate(packed.folder, other, sequences=1, length=32)
    with pytest.raises(FormatError, match="of another model: other has no linear"):
        bitmill.refine(other, packed.folder, out=tmp_path / "out")
