"""The model behind tests/golden/packed-v1 to packed-v4: every value from a formula.

One Llama block of hidden size 136 (a full group and a tail of 8), with every width among its
groups, a linear that is a tail alone, and column orders that siblings share.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bitmill.config.bit_width_map import BitWidthMap, LinearShape
from bitmill.formats.packed.checkpoint import write_checkpoint
from bitmill.formats.packed.layout import stored_tensors
from bitmill.io.safetensors import TensorInfo
from bitmill.quant.outliers import Outliers
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.rotation import packed_rewrites
from bitmill.quant.tensors import QuantizedWeight, Stored
from bitmill.quant.trellis import TrellisTensor, trellis_shapes
from bitmill_kernels.layout import group_columns, zero_bits

BLOCK = "model.layers.0"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float16",
    "vocab_size": 16,
    "hidden_size": 136,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES = (
    LinearShape(f"{BLOCK}.self_attn.q_proj", 8, 136),
    LinearShape(f"{BLOCK}.self_attn.k_proj", 4, 136),
    LinearShape(f"{BLOCK}.self_attn.v_proj", 4, 136),
    LinearShape(f"{BLOCK}.self_attn.o_proj", 136, 8),
    LinearShape(f"{BLOCK}.mlp.gate_proj", 24, 136),
    LinearShape(f"{BLOCK}.mlp.up_proj", 24, 136),
    LinearShape(f"{BLOCK}.mlp.down_proj", 136, 24),
)
WIDTHS = ((3, 2), (1, 5), (8, 1), (4,), (6, 6), (2, 3), (5,))
RATES = ((3, 7), (1, 5), (8, 1), (4,), (6, 6), (2, 3), (7,))
"""Widths of the same linears in trellis codes."""
EMBEDDING, EMBEDDING_WIDTHS = LinearShape("model.embed_tokens", 16, 136), (5, 5)
"""Packed beside linears in trellis codes."""
QUERY_ORDER = f"{BLOCK}.self_attn.q_proj.order"
ORDERS = {shape.name: QUERY_ORDER for shape in SHAPES[:3]}
OUTLIERS = {SHAPES[0].name: 2, SHAPES[3].name: 1, SHAPES[6].name: 3}
"""Columns in 16 bits of linears with affine codes: with an order, without one, of a tail."""
KEPT = (
    TensorInfo("model.embed_tokens.weight", "F16", (16, 136)),
    TensorInfo(f"{BLOCK}.input_layernorm.weight", "F16", (136,)),
    TensorInfo(f"{BLOCK}.post_attention_layernorm.weight", "F16", (136,)),
    TensorInfo("model.norm.weight", "F16", (136,)),
)


def golden_weight(index: int) -> QuantizedWeight:
    """Linear `index` of `SHAPES`."""
    return _of_formula(SHAPES[index], WIDTHS[index], index)


def golden_embedding() -> QuantizedWeight:
    """The embedding, packed."""
    return _of_formula(EMBEDDING, EMBEDDING_WIDTHS, len(SHAPES))


def _of_formula(shape: LinearShape, widths: tuple[int, ...], index: int) -> QuantizedWeight:
    N, K = shape.rows, shape.columns
    n, k = torch.arange(N)[:, None], torch.arange(K)[None]
    limits = [limit for b, c in zip(widths, group_columns(K), strict=True) for limit in [2**b] * c]
    codes = (7 * n + 3 * k + n * k + index) % torch.tensor(limits)
    g, row = torch.arange(len(widths))[:, None], torch.arange(N)[None]
    zeros = (5 * row + 3 * g + index) % torch.tensor([[2 ** zero_bits(b)] for b in widths])
    scales = (1 + (row + g) % 7) / 64 / torch.tensor([[2**b] for b in widths])
    scales[0, 1] = 0
    order = (37 * torch.arange(K) + 5) % K if shape.name in ORDERS else None
    return QuantizedWeight(
        codes.to(torch.uint8),
        scales.half(),
        zeros.to(torch.uint8),
        widths,
        Rewrites.of_order(order),
    )


def golden_kept(index: int) -> QuantizedWeight:
    """`golden_weight` with the outlier columns of `OUTLIERS`."""
    weight, count = golden_weight(index), OUTLIERS.get(SHAPES[index].name, 0)
    if not count:
        return weight
    columns = (weight.K - 1 - 5 * torch.arange(count)) % weight.K
    values = (torch.arange(weight.N * count).reshape(weight.N, count) * 11 % 29 - 14) / 8
    outliers = Outliers(columns.int(), values.half())
    return weight.rewritten(Rewrites([*weight.rewrites, outliers]))


def golden_trellis(index: int) -> TrellisTensor:
    """The same linear in trellis codes."""
    shape, rates = SHAPES[index], RATES[index]
    tensors = {}
    for key, (dtype, size) in trellis_shapes(shape.rows, shape.columns, rates).items():
        i = torch.arange(torch.Size(size).numel()).reshape(size)
        if dtype == torch.uint8:
            tensors[f"x.{key}"] = ((i * i * 31 + 17 * i + index) >> 3).to(torch.uint8)
        else:
            tensors[f"x.{key}"] = ((1 + (i * 5 + index) % 7) / 16).half()
    order = (37 * torch.arange(shape.columns) + 5) % shape.columns
    rewrites = packed_rewrites("trellis", order.int() if shape.name in ORDERS else None)
    return TrellisTensor.from_tensors("x", tensors, shape.rows, shape.columns, rates, rewrites)


def golden_tensor(name: str) -> torch.Tensor:
    """A kept tensor by its name."""
    spec = next(spec for spec in KEPT if spec.name == name)
    count = torch.arange(torch.Size(spec.shape).numel())
    return ((count * 29 % 64 - 20) / 32).half().reshape(spec.shape)


def write_golden(folder: Path, source: Path, code: str = "affine") -> None:
    """Write the packed folder; `source` is a folder for the source's config. code: "outliers" is
    affine with those of `OUTLIERS`, "mixed" trellis with a packed embedding."""
    mixed = code == "mixed"
    code = "trellis" if mixed else code
    widths, weight = {
        "affine": (WIDTHS, golden_weight),
        "outliers": (WIDTHS, golden_kept),
        "trellis": (RATES, golden_trellis),
    }[code]
    outliers = OUTLIERS if code == "outliers" else {}
    code = "affine" if outliers else code
    (source / "config.json").write_text(json.dumps(CONFIG, indent=2))
    names = [shape.name for shape in SHAPES]
    found = dict(zip(names, widths, strict=True))
    embeddings = {EMBEDDING.name: EMBEDDING_WIDTHS} if mixed else {}
    kept = [tensor for tensor in KEPT if tensor.name != f"{EMBEDDING.name}.weight" or not mixed]
    shapes = (*SHAPES, EMBEDDING) if mixed else SHAPES
    bit_widths = BitWidthMap(order="activation", linears=found | embeddings, outliers=outliers)

    def linear(name: str) -> Stored:
        quantized = golden_embedding() if name in embeddings else weight(names.index(name))
        packed: Stored = quantized.pack()
        return packed

    write_checkpoint(
        folder,
        source=source,
        tensors=stored_tensors(
            kept, shapes, bit_widths.linears, ORDERS, code, outliers, embeddings
        ),
        bit_widths=bit_widths,
        orders=ORDERS,
        code=code,
        affine=embeddings,
        linear=linear,
        other=golden_tensor,
    )
