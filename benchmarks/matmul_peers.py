"""Kernels of other projects that multiply packed weights, for `matmul.py --peers`.

- humming-kernels (PyPI): its folder on the path; it compiles with nvcc at first use, so `prepare`
  compiles what all cases need at once. Integers of one width, groups of 128, zero points.
- tinygemm: in torch (`_weight_int4pack_mm`), 4 bits, bf16.
- EXL2: exllamav2's kernels (`exl2_kernels.py`: its wheel's folder on the path, or
  BITMILL_EXL2_LIBRARY), groups of 128 of one width or of the case's mix, columns in an order of
  their own, its blocks chosen by its own timing for every case. It multiplies packed codes for up
  to 32 tokens; for more it writes the weight out in fp16 and calls cuBLAS.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, NamedTuple

import exl2_kernels
import torch
from export_readers.exl2_layout import weight as exl2_weight
from torch import Tensor

DEVICE = torch.device("cuda")
GROUP = 128
TINYGEMM_TOKENS = 64
"""Beyond these tinygemm is many times slower than fp16."""


class Peer(NamedTuple):
    """calls: y [T, N] of x [T, K] of `dtype`, one for each copy of a weight f32 [N, K]."""

    name: str
    calls: list[Callable[[Tensor], Tensor]]
    weight: Callable[[], Tensor]
    most_tokens: int = 1 << 30
    dtype: torch.dtype = torch.float16
    tolerance: float = 3e-3


class Codes(NamedTuple):
    """Random codes u8 [N, K], scales f16 [N, G] and zero points u8 [N, G]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def weight(self) -> Tensor:
        N, K = self.codes.shape
        groups = self.codes.view(N, K // GROUP, GROUP).float() - self.zeros.float()[:, :, None]
        return (groups * self.scales.float()[:, :, None]).view(N, K)


def random_codes(N: int, K: int, bits: int) -> Codes:
    draw = functools.partial(torch.randint, 0, 1 << bits, dtype=torch.uint8, device=DEVICE)
    scales = (torch.rand(N, K // GROUP, device=DEVICE) * 0.01 + 0.001).half()
    return Codes(draw((N, K)), scales, draw((N, K // GROUP)))


def peers(N: int, K: int, bits: int, widths: Sequence[int], nbytes: int) -> list[Peer]:
    """Those at hand for weights of this width, in copies of about `nbytes` together.

    widths: of every group, for those that have a width for each.
    """
    found = [humming(N, K, bits, nbytes)] if find_spec("humming") else []
    found += [tinygemm(N, K, nbytes)] if bits == 4 else []
    return [*found, exl2(N, widths, nbytes)] if exl2_kernels.available() else found


def prepare(shapes: Iterable[tuple[int, int, int]], tokens: Iterable[int]) -> None:
    """Compile humming's kernels for all (N, K, bits) and token counts, on all processors."""
    if not find_spec("humming"):
        return
    os.environ.setdefault("HUMMING_COMPILER", "nvcc")
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    jobs = {}
    for N, K, bits in shapes:
        layer = _humming_layer(N, K, bits)
        for T in tokens:
            found = dict(get_heuristics_config(layer, shape_m=T))
            found.pop("num_sms", None)
            jobs[N, K, bits, json.dumps(found, sort_keys=True)] = json.loads(layer.to_str()) | found

    def compile_one(job: dict[str, Any]) -> None:
        torch.cuda.set_device(0)
        HummingKernel(**job)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs.values()))


def _humming_layer(N: int, K: int, bits: int) -> Any:
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config

    schema = HummingWeightSchema(
        b_dtype=f"uint{bits}", weight_scale_group_size=GROUP, has_zero_point=True
    )
    return prepare_layer_config(N, K, schema, torch_dtype=torch.float16)


def humming(N: int, K: int, bits: int, nbytes: int) -> Peer:
    """With its own choice of tiles for this GPU."""
    from humming import ops
    from humming.forward import humming_forward
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    stored = random_codes(N, K, bits)
    layer = HummingLayer(
        shape_n=N,
        shape_k=K,
        weight_config={"dtype": f"uint{bits}", "group_size": GROUP, "has_zero_point": True},
        torch_dtype=torch.float16,
    ).cuda()
    zeros = ops.pack_weight(stored.zeros.t().int().contiguous(), bits).t().contiguous()
    weight = ops.pack_weight(stored.codes.int().contiguous(), bits)
    layer.load_from_tensors({"weight": weight, "weight_scale": stored.scales, "zero_point": zeros})
    layer.transform()
    own = (layer.weight.data, layer.weight_scale.data, layer.zero_point.data)
    choices: dict[int, str] = {}

    def call(tensors: tuple[Tensor, ...], x: Tensor) -> Tensor:
        T = len(x)
        if T not in choices:
            choices[T] = json.dumps(get_heuristics_config(layer.humming_config, shape_m=T))
        y: Tensor = humming_forward(
            layer.humming_config,
            x,
            **dict(zip(("weight", "weight_scale", "zero_point"), tensors, strict=True)),
            locks=layer.locks,
            tuning_config=choices[T],
        )
        return y

    return Peer(f"humming {bits}-bit", _calls(call, own, nbytes), stored.weight)


def tinygemm(N: int, K: int, nbytes: int) -> Peer:
    """Of bf16 activations."""
    stored = random_codes(N, K, 4)
    halves = (stored.codes[:, ::2] << 4 | stored.codes[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(halves, 8)
    scales = stored.scales.bfloat16()
    offsets = ((8 - stored.zeros.float()) * scales.float()).bfloat16()
    grid = torch.stack((scales.t(), offsets.t()), -1).contiguous()

    def weight() -> Tensor:
        codes = stored.codes.view(N, K // GROUP, GROUP).float() - 8
        groups = codes * scales.float()[:, :, None] + offsets.float()[:, :, None]
        return groups.view(N, K)

    def call(tensors: tuple[Tensor, ...], x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, tensors[0], GROUP, tensors[1])
        return y

    calls = _calls(call, (packed, grid), nbytes)
    return Peer("tinygemm 4-bit", calls, weight, TINYGEMM_TOKENS, torch.bfloat16, 2e-2)


def exl2(N: int, widths: Sequence[int], nbytes: int) -> Peer:
    """Its sums are in fp16, by atomics across blocks."""
    K = len(widths) * GROUP
    scratch = torch.empty(N * K, dtype=torch.half, device=DEVICE)
    stored = exl2_kernels.random_linear(N, widths, scratch.device)
    first = exl2_kernels.Matrix(stored, scratch)
    count = nbytes // first.nbytes + 1
    matrices = [first, *(exl2_kernels.Matrix(stored, scratch) for _ in range(count))]
    exl2_kernels.tune(matrices)

    def weight() -> Tensor:
        parts = (stored[name] for name in ("weight", "groups", "scale", "scale_max"))
        return exl2_weight(*parts)[:, stored["invperm"].long()]

    name = f"exl2 {widths[0]}-bit" if len(set(widths)) == 1 else "exl2 mix"
    return Peer(name, [matrix.product for matrix in matrices], weight, tolerance=2e-2)


def _calls(
    call: Callable[[tuple[Tensor, ...], Tensor], Tensor], own: tuple[Tensor, ...], nbytes: int
) -> list[Callable[[Tensor], Tensor]]:
    count = nbytes // sum(tensor.nbytes for tensor in own) + 1
    copies = [own, *(tuple(tensor.clone() for tensor in own) for _ in range(count))]
    return [functools.partial(call, tensors) for tensors in copies]
