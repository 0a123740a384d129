"""What is tuned of a model in trellis codes: scales of rows and groups, norms and biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.config.methods import TrellisOmniQuant
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.quant.rotation import packed_rewrites
from bitmill.quant.tensors import Quantized
from bitmill.quant.trellis import TrellisTensor
from bitmill.refinement.omniquant.end_to_end import (
    TunedModel,
    TuneSettings,
    final_hidden,
    tune_scales,
)
from bitmill.refinement.omniquant.trellis_scales import TrellisScales
from bitmill.refinement.vectors import LearnedVectors, restore_vectors, vectors
from bitmill_kernels.layout import group_columns
from bitmill_kernels.trellis.layout import tile_bytes
from learning import SPEC
from tiny import tiny_llama

SETTINGS = TuneSettings(steps=24, batch=4, scale_rate=3e-2, vector_rate=3e-2)


def coded(N: int, K: int, draw: torch.Generator) -> TrellisTensor:
    """A linear of random circles, at rates that take turns."""
    columns = group_columns(K)
    widths = tuple(2 + g % 2 for g in range(len(columns)))
    circles = [
        torch.randint(0, 256, (-(-N // 16), -(-c // 16), tile_bytes(k)), generator=draw)
        for c, k in zip(columns, widths, strict=True)
    ]
    rows = (0.04 + 0.02 * torch.rand(N, generator=draw)).half()
    groups = (0.8 + 0.4 * torch.rand(len(widths), generator=draw)).half()
    bytes_ = [one.to(torch.uint8) for one in circles]
    made = TrellisTensor.of_groups(bytes_, rows, groups, K, widths)
    order = torch.randperm(K, generator=draw)
    return made.rewritten(packed_rewrites("trellis", order))


@cache
def source(dtype: str = "float32") -> tuple[StreamedModel, dict[str, TrellisTensor]]:
    """A model whose linears are exactly trellis codes, and these codes."""
    folder, draw = Path(mkdtemp()), torch.Generator().manual_seed(5)
    tiny_llama(folder, dtype=dtype)
    plan = make_plan(folder, SPEC)
    codes = {linear.name: coded(linear.rows, linear.columns, draw) for linear in plan.linears}
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, code in codes.items():
        tensors[f"{name}.weight"] = code.dequantize().to(tensors[f"{name}.weight"])
    save_file(tensors, file, metadata={"format": "pt"})
    return StreamedModel(folder, plan, device=torch.device("cpu"), dtype=torch.float32), codes


def worse(codes: dict[str, TrellisTensor]) -> dict[str, TrellisTensor]:
    """The same circles with other scales."""
    draw = torch.Generator().manual_seed(6)
    return {
        name: replace(
            code,
            row_scales=(code.row_scales * (0.7 + 0.6 * torch.rand(code.N, generator=draw))).half(),
            group_scales=(code.group_scales * 1.2).half(),
        )
        for name, code in codes.items()
    }


@cache
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (16, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def kl(weights: Mapping[str, Quantized], changed: Mapping[str, torch.Tensor]) -> float:
    """Mean KL per held-out token, the obvious way."""
    model, windows = source()[0], tokens()[12:]
    hidden = model.embed(windows)
    for index in range(model.block_count):
        block = model.load_block(index)
        for name, module in model.linears(block, index).items():
            module.weight.copy_(weights[name].dequantize())
        restore_vectors(model, index, block, changed)
        hidden = model.run_block(index, block, hidden)
    p = model.logits(final_hidden(model, windows)).log_softmax(-1)
    q = model.logits(hidden).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def tuned(settings: TuneSettings = SETTINGS) -> TunedModel:
    model, codes = source()
    return tune_scales(model, worse(codes), tokens()[:12], tokens()[12:], settings, seed=0)


def test_scales_and_norms_lower_the_held_out_kl_and_circles_stay() -> None:
    start, made = worse(source()[1]), tuned()
    assert made.report.kept
    assert made.report.kl_after < 0.5 * made.report.kl_before
    assert kl(start, {}) == pytest.approx(made.report.kl_before, rel=1e-3)
    assert kl(made.weights, made.vectors) == pytest.approx(made.report.kl_after, rel=1e-3)
    for name, weight in made.weights.items():
        assert weight.codes_sha256() == start[name].codes_sha256()
        assert not torch.equal(weight.row_scales, start[name].row_scales)
        assert not torch.equal(weight.group_scales, start[name].group_scales)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in made.vectors} == {
        "input_layernorm",
        "post_attention_layernorm",
    }


def test_the_same_tuning_gives_the_same_bytes_and_vectors_can_be_left() -> None:
    short = replace(SETTINGS, steps=3)
    first, again = tuned(short), tuned(short)
    for name, weight in first.weights.items():
        assert torch.equal(weight.row_scales, again.weights[name].row_scales)
        assert torch.equal(weight.group_scales, again.weights[name].group_scales)
    assert all(torch.equal(v, again.vectors[name]) for name, v in first.vectors.items())
    assert not tuned(replace(short, vector_rate=0.0)).vectors


def test_weights_are_those_that_are_stored() -> None:
    _, codes = source()
    names = [name for name in codes if ".1." in name]
    learned = TrellisScales({name: codes[name] for name in names}, torch.device("cpu"))
    with torch.no_grad():
        for ratio in learned.ratios:
            ratio.mul_(1 + 0.1 * torch.rand_like(ratio))
        weights, stored = learned.weights(torch.float32), learned.export()
    for name in names:
        torch.testing.assert_close(weights[name], stored[name].dequantize(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(stored[name].row_scales, codes[name].row_scales)


def test_scales_that_grow_at_the_end_of_fp16_stay_in_it() -> None:
    code = coded(16, 128, torch.Generator().manual_seed(0))
    largest = replace(code, row_scales=torch.full_like(code.row_scales, 65504.0))
    learned = TrellisScales({"a": largest}, torch.device("cpu"))
    with torch.no_grad():
        learned.row_ratio.fill_(1.01)
    assert torch.equal(learned.export()["a"].row_scales, largest.row_scales)


def test_vectors_pass_through_the_type_they_are_stored_in() -> None:
    model, _ = source("bfloat16")
    block = model.load_block(0)
    before = vectors(model, 0, block)
    learned = LearnedVectors(model, 0, block)
    assert not learned.export()
    with torch.no_grad():
        for offset in learned.offsets:
            offset.add_(0.001 * torch.arange(len(offset)))
        learned.install()
    found = learned.export()
    assert found.keys() == before.keys()
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        place = block.get_submodule(name.removeprefix("model.layers.0.").removesuffix(".weight"))
        assert torch.equal(place.weight.to(torch.bfloat16), value)
        assert torch.equal(place.weight, value.float())
    learned.install()
    block.input_layernorm.weight.sum().backward()
    assert learned.offsets[0].grad is not None


def test_what_the_method_holds() -> None:
    method = TrellisOmniQuant(tune_scales_steps=10)
    assert method.learning is not None
    assert method.learning.whole_model == 2
    assert "shift" in method.needs
