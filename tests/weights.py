"""Quantized weights and small packed models for tests of the format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Allocation, Budget, QuantizationConfig
from bitmill.formats.accounting import checkpoint_tensors
from bitmill.formats.format import order_owners
from bitmill.formats.packed.checkpoint import write_checkpoint
from bitmill.plan.model_plan import Plan, make_plan
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.tensors import QuantizedWeight
from bitmill_kernels.layout import GROUP_SIZE, zero_bits


def random_weight(
    N: int, K: int, widths: tuple[int, ...], *, ordered: bool = False, seed: int = 0
) -> QuantizedWeight:
    """Every legal value occurs: codes and zeros uniform over their ranges, scales in (0, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def integers(shape: tuple[int, ...], bits: int) -> torch.Tensor:
        return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)

    starts = range(0, K, GROUP_SIZE)
    codes = [integers((N, min(GROUP_SIZE, K - s)), w) for s, w in zip(starts, widths, strict=True)]
    zeros = [integers((N,), zero_bits(width)) for width in widths]
    scales = torch.rand(len(widths), N, generator=generator).clamp_min(0.01).half()
    scales *= torch.tensor(widths)[:, None] > 0
    order = torch.randperm(K, generator=generator).int() if ordered else None
    return QuantizedWeight(
        torch.cat(codes, 1), scales, torch.stack(zeros), widths, Rewrites.of_order(order)
    )


def rounded_weight(
    weight: torch.Tensor, widths: tuple[int, ...], order: torch.Tensor | None = None
) -> QuantizedWeight:
    """`weight` f32 [N, K] rounded to the min-max grid of each row and group (not width 1)."""
    columns = weight if order is None else weight[:, order.long()]
    codes, scales, zeros = [], [], []
    for part, width in zip(columns.split(GROUP_SIZE, dim=1), widths, strict=True):
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        scale = ((high - low) / max(1, 2**width - 1)).half() * (width > 0)
        step = scale.float().clamp_min(1e-8)
        zero = (-low / step).round().clamp(0, 2**width - 1)
        code = (part / step[:, None] + zero[:, None]).round().clamp(0, 2**width - 1)
        codes.append(code.to(torch.uint8))
        scales.append(scale)
        zeros.append(zero.to(torch.uint8))
    grid = torch.stack(scales), torch.stack(zeros)
    return QuantizedWeight(torch.cat(codes, 1), *grid, widths, Rewrites.of_order(order))


@dataclass(frozen=True)
class PackedModel:
    """A packed folder with everything that went into it."""

    folder: Path
    source: Path
    plan: Plan
    map: BitWidthMap
    weights: dict[str, QuantizedWeight]
    tensor_hashes: dict[str, str]

    @property
    def code_hashes(self) -> dict[str, str]:
        """Digest of every linear's codes."""
        return {name: weight.codes_sha256() for name, weight in self.weights.items()}


def pack_model(
    source: Path,
    folder: Path,
    *,
    order: Literal["natural", "activation"] = "natural",
    embeddings: Literal["keep", "quantize"] = "keep",
    keep: tuple[str, ...] = (),
    cycle: tuple[int, ...] = (3, 4, 2, 6, 8, 5),
    quantize: Callable[..., QuantizedWeight] = rounded_weight,
    **options: Any,
) -> PackedModel:
    """Round the linears of a small model to mixed widths and write the packed folder.

    With `order="activation"` a random column order stands for the measured one.
    """
    spec = QuantizationConfig(
        budget=Budget(code_bits=8),
        allocation=Allocation(embeddings=embeddings, keep=keep, kept_dtype="source"),
    )
    plan = make_plan(source, spec)
    owners = order_owners(plan, order)
    stored = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    shuffled: dict[str, torch.Tensor] = {}
    weights, widths = {}, {}
    for place, linear in enumerate(plan.matrices):
        owner = owners.get(linear.name)
        if owner is not None and owner not in shuffled:
            shuffled[owner] = torch.randperm(linear.columns, generator=generator).int()
        matrix = stored[linear.source.tensor].float()
        matrix = matrix.t() if linear.source.transposed else matrix
        chosen = tuple(cycle[(place + group) % len(cycle)] for group in range(linear.shape.groups))
        widths[linear.name] = chosen
        weights[linear.name] = quantize(matrix, chosen, shuffled.get(owner or ""))
    bit_widths = BitWidthMap(order=order, linears=widths)
    folder.mkdir(parents=True, exist_ok=True)
    hashes = write_checkpoint(
        folder,
        source=source,
        tensors=checkpoint_tensors(plan, widths, order),
        bit_widths=bit_widths,
        orders={name: f"{owner}.order" for name, owner in owners.items()},
        linear=lambda name: weights[name].pack(),
        other=stored.__getitem__,
        **options,
    )
    return PackedModel(folder, source, plan, bit_widths, weights, hashes)


def dequantized_model(packed: PackedModel, dtype: torch.dtype = torch.float32) -> Any:
    """The source model with every quantized weight replaced by its dequantized value."""
    model = AutoModelForCausalLM.from_pretrained(packed.source, dtype=dtype).eval()
    with torch.no_grad():
        for linear in packed.plan.matrices:
            values = packed.weights[linear.name].dequantize()
            values = values.t() if linear.source.transposed else values
            model.get_submodule(linear.name).weight.copy_(values)
    return model
