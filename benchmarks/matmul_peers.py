"""Kernels of other projects that multiply packed weights, for `matmul.py --peers`.

- humming-kernels (PyPI): its folder on the path; it compiles with nvcc at first use, so `prepare`
  compiles what all cases need at once. Integers of one width, groups of 128, zero points.
- tinygemm: in torch (`_weight_int4pack_mm`), 4 bits, bf16.
- GemLite (PyPI, gemlite): its folder on the path; Triton, integers of 2 or 4 bits, groups of 128,
  zero points, its blocks chosen by its own timing at the first product of a shape and token count.
- Marlin (`marlin_kernels.py`: the folder of gptqmodel's sources on the path, or
  BITMILL_MARLIN_LIBRARY): 4 bits, groups of 128, with zero points and without.
- EXL2: exllamav2's kernels (`exl2_kernels.py`: its wheel's folder on the path, or
  BITMILL_EXL2_LIBRARY), groups of 128 of one width or of the case's mix, columns in an order of
  their own, its blocks chosen by its own timing for every case. It multiplies packed codes for up
  to 32 tokens; for more it writes the weight out in fp16 and calls cuBLAS.
- EXL3: exllamav3's kernels (`exl3_kernels.py`: its wheel's folder on the path, or
  BITMILL_EXL3_LIBRARY), trellis codes of one rate with rotations of 128, its blocks chosen by its
  own timing. It multiplies packed codes for up to 144 tokens.

Peers of a width that are not there, fail, are wrong or cannot run in a CUDA graph come back with
the reason.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import exl2_kernels
import exl3_kernels
import marlin_kernels
import torch
from export_readers.exl2_layout import weight as exl2_weight
from torch import Tensor
from trial_graph import replayed

DEVICE = torch.device("cuda")
GROUP = 128
GEMLITE_BITS = (2, 4)
TINYGEMM_TOKENS = 64
"""Beyond these tinygemm is many times slower than fp16."""


class Peer(NamedTuple):
    """calls: y [T, N] of x [T, K] of `dtype`, one for each copy of a weight f32 [N, K]."""

    name: str
    calls: Sequence[Callable[[Tensor], Tensor]]
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


def peers(
    N: int, K: int, bits: int, widths: Sequence[int], nbytes: int
) -> tuple[list[Peer], dict[str, str]]:
    """Those for weights of this width, in copies of about `nbytes` together, and why others fail.

    widths: of every group, for those that have a width for each.
    """
    makers: dict[str, Callable[[], Peer]] = {
        "humming": lambda: humming(N, K, bits, nbytes),
        "exl2": lambda: exl2(N, widths, nbytes),
    }
    if bits in exl3_kernels.RATES:
        makers["exl3"] = lambda: exl3(N, K, bits, nbytes)
    if bits in GEMLITE_BITS:
        makers["gemlite"] = lambda: gemlite(N, K, bits, nbytes)
    if bits == 4:
        makers["tinygemm"] = lambda: tinygemm(N, K, nbytes)
        makers["marlin"] = lambda: marlin(N, K, nbytes, symmetric=False)
        makers["marlin symmetric"] = lambda: marlin(N, K, nbytes, symmetric=True)
    found: list[Peer] = []
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found.append(make())
        except Exception as error:  # noqa: BLE001  (foreign code may raise anything)
            absent[name] = reason(error)
    return found, absent


def versions() -> dict[str, str]:
    """Of every package that has peers, or why it is not there."""
    readers: dict[str, Callable[[], str]] = {
        "humming-kernels": lambda: version("humming-kernels"),
        "gemlite": lambda: version("gemlite"),
        "gptqmodel": lambda: marlin_kernels.load().marlin_version().decode(),
        "exllamav2": lambda: exl2_kernels.load().exl2_version().decode(),
        "exllamav3": lambda: exl3_kernels.load().exl3_version().decode(),
    }
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except Exception as error:  # noqa: BLE001  (foreign code may raise anything)
            found[name] = f"absent, {reason(error)}"
    return found


def reason(error: Exception) -> str:
    """An exception in a line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def faults(
    peer: Peer,
    K: int,
    token_counts: Iterable[int],
    run: Callable[[Callable[[], Tensor]], Tensor] = replayed,
) -> dict[int, str]:
    """Token counts, of those that it is timed for, where it fails or is wrong, and how.

    run: gives a call's product. The product of a graph is checked, as graphs are timed.
    """
    tokens = [T for T in token_counts if peer.most_tokens >= T]
    if not tokens:
        return {}
    x = torch.randn(max(tokens), K, device=DEVICE).to(peer.dtype)
    exact = x.double() @ peer.weight().double().t()
    found: dict[int, str] = {}
    for T in tokens:
        try:
            y = run(functools.partial(peer.calls[0], x[:T])).double()
        except Exception as error:  # noqa: BLE001  (foreign code may raise anything)
            found[T] = reason(error)
            continue
        off = ((y - exact[:T]).norm() / exact[:T].norm()).item()
        if not off < peer.tolerance:
            found[T] = f"relative error {off:.2e}, where {peer.tolerance:.0e} is allowed"
    return found


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


def exl3(N: int, K: int, rate: int, nbytes: int) -> Peer:
    """Both rotations of a linear included."""
    scratch = torch.empty(N * K, dtype=torch.half, device=DEVICE)
    stored = exl3_kernels.random_linear(N, K, rate, scratch.device)
    first = exl3_kernels.Matrix(stored, scratch)
    count = nbytes // first.nbytes + 1
    matrices = [first, *(exl3_kernels.Matrix(stored, scratch) for _ in range(count))]
    calls = [matrix.product for matrix in matrices]
    return Peer(f"exl3 {rate}-bit", calls, first.weight, tolerance=2e-2)


def marlin(N: int, K: int, nbytes: int, *, symmetric: bool) -> Peer:
    """Symmetric: all zero points are 8 and none is stored."""
    stored = random_codes(N, K, 4)
    if symmetric:
        stored = stored._replace(zeros=torch.full_like(stored.zeros, 8))
    own = [
        marlin_kernels.packed_codes(stored.codes),
        marlin_kernels.scales_in_order(stored.scales),
    ]
    if not symmetric:
        own.append(marlin_kernels.packed_zeros(stored.zeros))
    scratch = marlin_kernels.Scratch(own[0].device)

    def call(tensors: tuple[Tensor, ...], x: Tensor) -> Tensor:
        zeros = None if symmetric else tensors[2]
        return marlin_kernels.product(x, tensors[0], tensors[1], zeros, scratch)

    name = "marlin 4-bit symmetric" if symmetric else "marlin 4-bit"
    return Peer(name, _calls(call, tuple(own), nbytes), stored.weight)


def gemlite(N: int, K: int, bits: int, nbytes: int) -> Peer:
    """Its offsets, zero points times scales, are rounded to fp16."""
    from gemlite import DType, GemLiteLinear, forward_functional

    stored = random_codes(N, K, bits)
    linear = GemLiteLinear(bits, GROUP, K, N, DType.FP16, DType.FP16)
    linear.pack(stored.codes, stored.scales, stored.zeros.half())
    *own, unused = (tensor.detach() for tensor in linear.get_tensor_args())
    settings = linear.get_meta_args()

    def call(tensors: tuple[Tensor, ...], x: Tensor) -> Tensor:
        y: Tensor = forward_functional(x, None, [*tensors, unused], settings)
        return y

    calls = _calls(call, tuple(own), nbytes)
    return Peer(f"gemlite {bits}-bit", calls, stored.weight, tolerance=1e-2)


def _calls(
    call: Callable[[tuple[Tensor, ...], Tensor], Tensor], own: tuple[Tensor, ...], nbytes: int
) -> list[Callable[[Tensor], Tensor]]:
    count = nbytes // sum(tensor.nbytes for tensor in own) + 1
    copies = [own, *(tuple(tensor.clone() for tensor in own) for _ in range(count))]
    return [functools.partial(call, tensors) for tensors in copies]
