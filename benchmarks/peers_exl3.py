"""EXL3 by ExLlamaV3's own quantizer, on any calibration windows.

The installed package compiles all of its CUDA files when it is imported; its quantizer needs few
of them. So its modules are imported under their own names without the package's
`__init__`, and only what they call is compiled, into `build` (a minute on 16 cores).

Blocks are quantized in turn on the quantized prefix, as the package's converter does, with its
defaults (codebook mul1, regularization, refit), and a rate between two that a linear can have is
spread over linears as there: attention first, blocks near either end first. Linears whose widths
are no multiples of 128 are refused: that package pads them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.calibration.hooks import batches, embed_windows, observe_ends, run_windows
from bitmill.models.streamed import StreamedModel, set_weight, weight_of

PACKAGE = "exllamav3"
UNITS = (
    "hadamard.cpp",
    "quant/quantize.cu",
    "quant/pack.cu",
    "quant/frac.cu",
    "quant/exl3_devctx.cu",
    "quant/comp_units/quantize_tiles*_inst*.cu",
)
HEADERS = ("hadamard.h", "quant/quantize.cuh", "quant/pack.cuh", "quant/frac.cuh")
FUNCTIONS = (
    *("had_paley", "had_paley2", "decode", "test_distribution", "pack_signs"),
    *("quantize_tiles", "quantize_tiles_scratch", "quantize_tiles_frac"),
    *("pack_trellis", "unpack_trellis", "pack_trellis_frac", "unpack_trellis_frac"),
)
FLAGS = ("-O3", "--use_fast_math", "-Xcudafe", "--diag_suppress=177")
QUANTIZER = f"{PACKAGE}.modules.quant.exl3_lib.quantize"

SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gu", "up_proj": "gu"}
"""Linears of a block with one input, which get one rate; any other stands for itself."""
FIRST = ("qkv", "o_proj")
"""What is given a higher rate before the rest."""
BATCH = 8


@cache
def quantizer(build: Path) -> ModuleType:
    """The package's module with `quantize_exl3`."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==1.6.5")
    root = Path(spec.submodule_search_locations[0])
    parents = QUANTIZER.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*parents[1:depth]))]
        sys.modules[name] = module
    found: Any = ModuleType(f"{PACKAGE}.ext")
    found.exllamav3_ext = extension(root / "exllamav3_ext", build)
    sys.modules[found.__name__] = found
    return importlib.import_module(QUANTIZER)


def extension(sources: Path, build: Path) -> Any:
    """The functions that the quantizer calls."""
    from torch.utils.cpp_extension import load

    build.mkdir(parents=True, exist_ok=True)
    bindings = build / "bindings.cpp"
    includes = ["torch/extension.h", "pybind11/stl.h", *HEADERS]
    code = [
        *(f"#include <{header}>" for header in includes),
        "PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {",
        *(f'  m.def("{name}", &{name});' for name in FUNCTIONS),
        "}",
    ]
    text = "\n".join(code) + "\n"
    if not bindings.exists() or bindings.read_text() != text:
        bindings.write_text(text)
    units = [str(unit) for pattern in UNITS for unit in sorted(sources.glob(pattern))]
    return load(
        name="exllamav3_ext",
        sources=[str(bindings), *units],
        extra_include_paths=[str(sources)],
        extra_cflags=["-O3"],
        extra_cuda_cflags=list(FLAGS),
        build_directory=str(build),
    )


@dataclass(frozen=True)
class _Group:
    """Linears of one block that share a rate."""

    block: int
    kind: str
    names: list[str] = field(default_factory=list)


def kind_of(name: str) -> str:
    """The group of its block that a linear belongs to."""
    leaf = name.rsplit(".", 1)[-1]
    return SHARED.get(leaf, leaf)


def next_rate(rate: float) -> float:
    """The next higher rate of a linear: by halves below 4 bits."""
    return min(8.0, rate + (0.5 if rate < 4 else 1.0))


def spread(sizes: Mapping[int, Mapping[str, int]], bits: float) -> dict[str, float]:
    """A rate for every linear, at most `bits` on average; sizes: weights by block and name."""
    groups = [
        _Group(block, kind, [name for name in linears if kind_of(name) == kind])
        for block, linears in sizes.items()
        for kind in dict.fromkeys(map(kind_of, linears))
    ]
    last = max(sizes)
    groups.sort(key=lambda g: (g.kind not in FIRST, min(g.block, last - g.block), g.block))
    weights = {name: size for linears in sizes.values() for name, size in linears.items()}
    floor = int(bits * 2) / 2 if bits < 4 else float(int(bits))
    rates = dict.fromkeys(weights, floor)
    left = int(bits * sum(weights.values())) - floor * sum(weights.values())
    raised = True
    while raised:
        raised = False
        for group in groups:
            cost = sum((next_rate(rates[n]) - rates[n]) * weights[n] for n in group.names)
            if 0 < cost <= left:
                rates |= {name: next_rate(rates[name]) for name in group.names}
                left -= cost
                raised = True
    return rates


@dataclass(frozen=True)
class Exl3:
    """Dequantized weights f32 [N, K] by name; bits a weight that are stored and that are codes."""

    weights: dict[str, Tensor]
    bits: float
    code_bits: float


@torch.no_grad()
def quantize(model: StreamedModel, tokens: Tensor, bits: float, build: Path) -> Exl3:
    """Quantize all linears on windows i64 [S, T]."""
    module = quantizer(build)
    rates = spread(sizes_of(model), bits)
    hidden = embed_windows(model, tokens, batch=BATCH)
    weights: dict[str, Tensor] = {}
    stored = codes = 0
    for index in range(model.block_count):
        block = model.load_block(index)
        linears = model.linears(block, index)
        moments = moments_of(model, index, block, hidden)
        for name, linear in linears.items():
            made, _, parts = module.quantize_exl3(
                weight_of(linear).detach().float().T.contiguous(),
                moments[kind_of(name)],
                settings_of(rates[name], len(weights), model.device),
                True,
            )
            weights[name] = made.T.float().cpu()
            set_weight(linear, made.T)
            codes += parts["trellis"].nbytes
            stored += sum(parts[part].nbytes for part in ("trellis", "suh", "svh"))
        run_windows(model, index, block, hidden, batch=BATCH, out=hidden)
    count = sum(weight.numel() for weight in weights.values())
    return Exl3(weights, 8 * stored / count, 8 * codes / count)


def sizes_of(model: StreamedModel) -> dict[int, dict[str, int]]:
    """Weights of every linear by block and name."""
    found: dict[int, dict[str, int]] = {}
    for shape in model.plan.shapes:
        if shape.rows % 128 or shape.columns % 128:
            raise SystemExit(f"{shape.name}, {shape.rows}x{shape.columns}: no multiple of 128")
        index = int(shape.name.removeprefix(f"{model.plan.block_prefix}.").split(".")[0])
        found.setdefault(index, {})[shape.name] = shape.weights
    return found


def settings_of(rate: float, seed: int, device: torch.device) -> dict[str, Any]:
    """What the package's converter asks of its quantizer by default."""
    return {
        "K": int(rate) if rate.is_integer() else rate,
        "seed": seed,
        "devices": [device.index or 0],
        "device_ratios": None,
        "apply_out_scales": None,
        "mul1": True,
    }


def moments_of(
    model: StreamedModel, index: int, block: nn.Module, hidden: Tensor
) -> dict[str, dict[str, Any]]:
    """What the package collects of every kind of input: the sum of x x^T, and its own notes."""
    linears = model.linears(block, index)
    firsts = {name: kind for kind, name in {kind_of(n): n for n in reversed(linears)}.items()}
    found: dict[str, dict[str, Any]] = {}
    for part in batches(len(hidden), BATCH):
        read = {name: linears[name] for name in firsts}
        seen = observe_ends(model, index, block, read, {}, hidden[part]).inputs
        for name, kind in firsts.items():
            x = seen[name].float()
            moments = found.setdefault(kind, _empty(kind, x.shape[1], x.device))
            moments["H"].addmm_(x.T, x)
            moments["count"] += len(x)
            moments["num_total"] += len(x)
    return found


def _empty(kind: str, width: int, device: torch.device) -> dict[str, Any]:
    return {
        "H": torch.zeros(width, width, device=device),
        "n": width,
        "count": 0,
        "num_total": 0,
        "packed": False,
        "finalized": False,
        "first_key": kind,
        "device": device,
        "inf_nan": torch.zeros(2, dtype=torch.long, device=device),
    }
