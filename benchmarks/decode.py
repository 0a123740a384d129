"""Tokens per second of a Llama-shaped model with random weights, packed against fp16.

    python benchmarks/decode.py                 7B shape, 3 bits on average, one H100
    python benchmarks/decode.py --layers 2      a quick look
    python benchmarks/decode.py --batch 1 8 32 64 --cache 1024   sequences a step
    python benchmarks/decode.py --step 1 4 8 --cache 1024   drafted tokens verified in a step
    python benchmarks/decode.py --kv-heads 8    heads of keys and values, each of four queries

One decode step of the whole model is captured in a CUDA graph and replayed; the median of the
replays counts. A step takes a token of each sequence or, as speculative decoding does to verify a
draft, several that follow each other: each attends to the cache and to those of its step up to
itself. All of them count as tokens, as if every draft were right. Both models share every line but
the products: q/k/v and gate/up are one product each in both. What lies between the products is in
`decode_glue.py`. The KV cache is static and full. Embedding and head stay fp16. Prefill is timed
eagerly. Peak memory is that of building and running the model, of weights made on the device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from decode_glue import EPSILON, Glue
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from bitmill_kernels.layout import code_tensor_shapes, zero_tensor_shapes
from bitmill_kernels.matmul.linear import MixedLinear
from bitmill_kernels.matmul.runtime import PackedWeight

DEVICE = torch.device("cuda")
HALF = torch.float16
REPLAYS = 40
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Shape:
    layers: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    kv_heads: int = 32
    vocabulary: int = 32000
    cache: int = 512

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_hidden(self) -> int:
        return self.kv_heads * self.head_size

    def products(self) -> dict[str, tuple[list[int], int]]:
        """Rows of the stacked linears, and columns, by name."""
        return {
            "qkv": ([self.hidden, self.kv_hidden, self.kv_hidden], self.hidden),
            "o": ([self.hidden], self.hidden),
            "gate_up": ([self.inner] * 2, self.hidden),
            "down": ([self.hidden], self.inner),
        }


Product = Callable[[Tensor], Tensor]


def packed_product(rows: list[int], K: int, pattern: tuple[int, ...]) -> Product:
    groups = -(-K // 128)
    weights = []
    for shift, N in enumerate(rows):
        widths = tuple(pattern[(g + shift) % len(pattern)] for g in range(groups))
        shapes = code_tensor_shapes(N, K, widths) | zero_tensor_shapes(N, widths)
        tensors = {
            name: torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE)
            for name, size in shapes.items()
        }
        tensors["scales"] = (torch.rand(groups, N, device=DEVICE) * 0.002).half()
        weights.append(PackedWeight(tensors, widths, N, K))
    return MixedLinear(weights, DEVICE)


def half_product(rows: list[int], K: int) -> Product:
    weight = torch.empty(sum(rows), K, device=DEVICE, dtype=HALF).normal_(std=0.02)
    return lambda x: linear(x, weight)


def normed(hidden: Tensor, added: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden + added, its RMS norm)."""
    total = hidden + added
    return total, rms_norm(total, (total.shape[-1],), scale, EPSILON)


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def heads_of(qkv: Tensor, shape: Shape) -> tuple[Tensor, ...]:
    """Queries, keys and values [n, heads, size] of qkv [n, all of them]."""
    parts = qkv.split([shape.hidden, shape.kv_hidden, shape.kv_hidden], dim=-1)
    return tuple(part.unflatten(-1, (-1, shape.head_size)) for part in parts)


def attend_prefill(qkv: Tensor, shape: Shape, cosine: Tensor, sine: Tensor) -> Tensor:
    q, k, v = (part.transpose(0, 1)[None] for part in heads_of(qkv, shape))
    q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
    y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y[0].transpose(0, 1).flatten(1)


class Model:
    """The decoder of one shape for `batch` sequences B of `step` tokens S a step.

    `pattern` None means fp16.
    """

    def __init__(
        self, shape: Shape, pattern: tuple[int, ...] | None, batch: int, step: int
    ) -> None:
        self.shape = shape
        self.layers = [
            {
                name: half_product(rows, K) if pattern is None else packed_product(rows, K, pattern)
                for name, (rows, K) in shape.products().items()
            }
            for _ in range(shape.layers)
        ]
        size = (shape.layers, batch, shape.kv_heads, shape.cache, shape.head_size)
        self.keys = torch.zeros(size, device=DEVICE, dtype=HALF)
        self.values = torch.zeros(size, device=DEVICE, dtype=HALF)
        self.scale = torch.ones(shape.hidden, device=DEVICE, dtype=HALF)
        table = (shape.vocabulary, shape.hidden)
        self.embedding = torch.empty(table, device=DEVICE, dtype=HALF).normal_(std=0.02)
        self.head = torch.empty(table, device=DEVICE, dtype=HALF).normal_(std=0.02)
        angle = torch.rand(shape.cache, shape.head_size, device=DEVICE)
        self.cosine, self.sine = angle.cos().to(HALF), angle.sin().to(HALF)
        self.place = torch.tensor([shape.cache - step], device=DEVICE)
        self.nothing = torch.zeros(batch * step, shape.hidden, device=DEVICE, dtype=HALF)
        self.glue = Glue(
            shape.heads,
            shape.head_size,
            shape.cache,
            DEVICE,
            batch=batch,
            step=step,
            kv_heads=shape.kv_heads,
        )

    def step(self, token: Tensor) -> Tensor:
        """Next tokens int64 [B * S] of tokens int64 [B * S], those of a sequence in turn."""
        glue = self.glue
        hidden = embedding(token, self.embedding)
        x = glue.add_norm(hidden, self.nothing, self.scale)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            mixed = glue.attend(layer["qkv"](x), keys, values, self.cosine, self.sine, self.place)
            x = glue.add_norm(hidden, layer["o"](mixed), self.scale)
            inner = glue.gate(layer["gate_up"](x))
            x = glue.add_norm(hidden, layer["down"](inner), self.scale)
        return linear(x, self.head).argmax(-1)

    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits of the last token of int64 [T]."""
        hidden = self.embedding[tokens]
        x = rms_norm(hidden, (self.shape.hidden,), self.scale, EPSILON)
        cosine, sine = self.cosine[: len(tokens)], self.sine[: len(tokens)]
        for layer in self.layers:
            mixed = attend_prefill(layer["qkv"](x), self.shape, cosine, sine)
            hidden, x = normed(hidden, layer["o"](mixed), self.scale)
            hidden, x = normed(hidden, layer["down"](gated(layer["gate_up"](x))), self.scale)
        return linear(x[-1:], self.head)


def check_glue(shape: Shape, step: int, batch: int = 2) -> None:
    """Raise RuntimeError where the glue differs from torch by more than rounding."""
    size, place = shape.head_size, shape.cache - step - 2
    glue = Glue(
        shape.heads, size, shape.cache, DEVICE, batch=batch, step=step, kv_heads=shape.kv_heads
    )
    rows = batch * step
    hidden, added = (torch.randn(rows, shape.hidden, device=DEVICE).half() for _ in range(2))
    scale = torch.randn(shape.hidden, device=DEVICE).half()
    expected, expected_norm = normed(hidden, added, scale)
    norm = glue.add_norm(hidden, added, scale)
    gate_up = torch.randn(rows, 2 * shape.inner, device=DEVICE).half()
    cache = (batch, shape.kv_heads, shape.cache, size)
    keys, values = (torch.randn(cache, device=DEVICE).half() for _ in range(2))
    angle = torch.rand(shape.cache, size, device=DEVICE)
    cosine, sine = angle.cos().half(), angle.sin().half()
    qkv = torch.randn(rows, shape.hidden + 2 * shape.kv_hidden, device=DEVICE).half()
    parts = (part.unflatten(0, (batch, step)) for part in heads_of(qkv, shape))
    q, k, v = (part.transpose(1, 2) for part in parts)
    here = slice(place, place + step)
    q, k = rotate(q, cosine[here], sine[here]), rotate(k, cosine[here], sine[here])
    all_keys, all_values = keys.clone(), values.clone()
    all_keys[:, :, here], all_values[:, :, here] = k, v
    seen = torch.ones(step, shape.cache, device=DEVICE, dtype=torch.bool)
    seen[:, here] = seen[:, here].tril()
    mixed = scaled_dot_product_attention(q, all_keys, all_values, attn_mask=seen, enable_gqa=True)
    found = glue.attend(qkv, keys, values, cosine, sine, torch.tensor([place], device=DEVICE))
    pairs = {
        "sum": (hidden, expected),
        "norm": (norm, expected_norm),
        "gate": (glue.gate(gate_up), gated(gate_up)),
        "keys": (keys, all_keys),
        "values": (values, all_values),
        "attention": (found, mixed.transpose(1, 2).reshape(rows, -1)),
    }
    for name, (got, wanted) in pairs.items():
        if not torch.allclose(got, wanted, rtol=1e-2, atol=5e-3):
            raise RuntimeError(f"the decode glue is wrong: {name} differs from torch")


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def measure(
    shape: Shape, pattern: tuple[int, ...] | None, batch: int, step: int
) -> dict[str, float]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        model = Model(shape, pattern, batch, step)
        token = torch.zeros(batch * step, dtype=torch.int64, device=DEVICE)
        for _ in range(3):
            model.step(token)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.step(token)
        graph.replay()
        decode = milliseconds(graph.replay, REPLAYS)
        tokens = torch.randint(0, shape.vocabulary, (PREFILL_TOKENS,), device=DEVICE)
        logits = model.prefill(tokens)
        if not torch.isfinite(logits).all():
            raise RuntimeError("the logits are not finite")
        prefill = milliseconds(lambda: model.prefill(tokens), 5)
    return {
        "decode_tokens_per_second": round(batch * step * 1e3 / decode, 1),
        "decode_milliseconds": round(decode, 3),
        "prefill_tokens_per_second": round(PREFILL_TOKENS * 1e3 / prefill, 0),
        "peak_gigabytes": round((torch.cuda.max_memory_allocated() - before) / 1e9, 2),
    }


def compared(shape: Shape, widths: str, batch: int, step: int) -> dict[str, object]:
    """What `measure` finds of the packed model and of fp16, and their ratios."""
    packed = measure(shape, tuple(int(width) for width in widths), batch, step)
    half = measure(shape, None, batch, step)
    found = {
        "batch": batch,
        "step": step,
        "packed": packed,
        "fp16": half,
        "decode_speedup": round(half["decode_milliseconds"] / packed["decode_milliseconds"], 3),
        "memory_ratio": round(packed["peak_gigabytes"] / half["peak_gigabytes"], 3),
    }
    print(json.dumps(found), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--widths", default="3243", help="widths in turn over the groups")
    parser.add_argument("--batch", nargs="*", type=int, default=[1], help="sequences a step")
    parser.add_argument("--step", nargs="*", type=int, default=[1], help="tokens of a sequence")
    parser.add_argument("--kv-heads", type=int, default=Shape.kv_heads)
    parser.add_argument("--cache", type=int, default=Shape.cache, help="positions of a sequence")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    shape = Shape(layers=options.layers, kv_heads=options.kv_heads, cache=options.cache)
    for step in options.step:
        check_glue(shape, step)
    gpu = torch.cuda.get_device_name()
    result = {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "layers": shape.layers,
        "cache": shape.cache,
        "kv_heads": shape.kv_heads,
        "widths": options.widths,
        "batches": [
            compared(shape, options.widths, batch, step)
            for batch in options.batch
            for step in options.step
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    fewer = "" if shape.kv_heads == shape.heads else f"-{shape.kv_heads}-kv-heads"
    file = options.out / f"decode-{gpu.replace(' ', '-').lower()}{fewer}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
