"""Cases for Triton's interpreter: the kernels between the products of `benchmarks/decode.py`."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

PLACE = Path(__file__).parents[2] / "benchmarks" / "decode_glue.py"
SPEC = importlib.util.spec_from_file_location("decode_glue", PLACE)
decode_glue = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(decode_glue)

CPU = torch.device("cpu")
SIZE = 32


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def glue(heads=1, cache=64, **options):
    return decode_glue.Glue(heads, SIZE, cache, CPU, overlap=False, **options)


def rotated(x, cosine, sine):
    first, second = x.float().chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def attended(qkv, keys, values, cosine, sine, place):
    """What torch attends; keys and values become those with the tokens' own, in fp32."""
    batch, kv_heads, cache, _ = keys.shape
    heads = qkv.float().view(batch, -1, qkv.shape[1] // SIZE, SIZE).transpose(1, 2)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    step = q.shape[2]
    here = slice(place, place + step)
    angles = cosine[here].float(), sine[here].float()
    keys[:, :, here], values[:, :, here] = rotated(k, *angles), v
    seen = torch.ones(step, cache, dtype=torch.bool)
    seen[:, here] = torch.ones(step, step, dtype=torch.bool).tril()
    q = rotated(q, *angles)
    y = scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
    return y.transpose(1, 2).flatten(2).flatten(0, 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "batch", "cache", "splits"),
    [
        (2, 2, 1, 64, 1),
        (2, 2, 3, 192, 1),
        (8, 2, 2, 256, 4),
        (4, 2, 2, 384, 2),
        (32, 1, 1, 128, 2),
    ],
    ids=["a tile", "one run", "a tile each", "runs", "many queries"],
)
@pytest.mark.parametrize("step", [1, 5, 8])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_attention_is_that_of_torch(heads, kv_heads, batch, cache, splits, where, step):
    # From the middle on a step lies on both sides of where tiles, and runs, meet.
    place = {"first": 0, "middle": cache // 2 - step // 2, "last": cache - step}[where]
    kernels = glue(heads, cache, batch=batch, step=step, kv_heads=kv_heads)
    assert kernels.splits == splits
    qkv = random(1, batch * step, (heads + 2 * kv_heads) * SIZE)
    keys, values = (random(seed, batch, kv_heads, cache, SIZE) for seed in (2, 3))
    keys[:, :, place : place + step] *= 100  # what was there before must not count
    angle = torch.rand(cache, SIZE, generator=torch.Generator().manual_seed(4))
    cosine, sine = angle.cos().half(), angle.sin().half()
    wide = keys.float(), values.float()
    expected = attended(qkv, *wide, cosine, sine, place)
    for _ in range(2):  # again: the counters must have returned to zero
        found = kernels.attend(qkv, keys, values, cosine, sine, torch.tensor([place]))
        assert torch.allclose(found.float(), expected, rtol=5e-3, atol=2e-3)
    assert torch.equal(keys, wide[0].half())
    assert torch.equal(values, wide[1].half())


def test_a_token_far_above_the_cache_attends_to_itself():
    own, value = 8 * random(1, SIZE), random(2, SIZE)
    keys, values = (random(seed, 1, 1, 128, SIZE) for seed in (3, 4))
    cosine, sine = torch.ones(128, SIZE).half(), torch.zeros(128, SIZE).half()
    qkv = torch.cat((own, own, value))[None]
    found = glue(cache=128).attend(qkv, keys, values, cosine, sine, torch.tensor([5]))
    assert torch.equal(found[0], value)


@pytest.mark.parametrize(
    ("kv_heads", "batch", "splits"), [(1, 1, 16), (8, 8, 8), (8, 32, 2), (8, 48, 2), (8, 64, 1)]
)
def test_a_cache_is_split_for_few_sequences(kv_heads, batch, splits):
    assert glue(kv_heads, 2048, batch=batch).splits == splits


def test_the_norm_is_of_the_sum():
    hidden, added, scale = random(1, 3, 96), random(2, 3, 96), random(3, 96)
    total = hidden + added
    found = glue().add_norm(hidden, added, scale)
    expected = rms_norm(total.float(), (96,), eps=decode_glue.EPSILON) * scale
    assert torch.equal(hidden, total)
    assert torch.allclose(found.float(), expected, rtol=2e-3, atol=1e-3)


def test_the_gate_is_silu_times_the_other_half():
    gate_up = random(1, 2, 2 * 700)
    gate, up = gate_up.float().chunk(2, dim=-1)
    found = glue().gate(gate_up)
    assert torch.allclose(found.float(), silu(gate) * up, rtol=2e-3, atol=1e-3)
