import hashlib

import numpy as np
import pytest
import torch

from bitmill_kernels.layout import PLANES, WIDTHS, code_tensor_shapes, group_columns
from bitmill_kernels.pack import pack_codes, pack_zeros, unpack_codes, unpack_zeros

GOLDEN_DIGESTS = {
    "codes_b1_p1": "1e1deff6423ccde7",
    "codes_b2_p2": "cacaac5073f347a7",
    "codes_b3_p2": "cacaac5073f347a7",
    "codes_b3_p1": "5ad15913cd4a672b",
    "codes_b4_p4": "cb0d9e404538887e",
    "codes_b5_p4": "cb0d9e404538887e",
    "codes_b5_p1": "b1c919fb096b8216",
    "codes_b6_p4": "cb0d9e404538887e",
    "codes_b6_p2": "e135c65399bc70ef",
    "codes_b8_p8": "0b7c00653cc40ebb",
    "tail_p2": "d724698697382d8b",
    "tail_p1": "28ba096786c18082",
}
GOLDEN_TAIL_P2 = "55003f2a003f2a15"
GOLDEN_TAIL_P1 = "6626190c"
GOLDEN_B3_P1 = "0000ffffffff00000000ffffffff0000"


def random_codes(N, K, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randint(0, 1 << width, (N, columns), generator=generator, dtype=torch.uint8)
        for width, columns in zip(widths, group_columns(K), strict=True)
    ]
    return torch.cat(parts, dim=1) if parts else torch.empty(N, 0, dtype=torch.uint8)


def naive_plane(codes, plane):
    """The rule of the format, one field at a time: codes [N, c] of one group -> bytes."""
    N, columns = codes.shape
    length = plane * -(-columns // 8)
    packed = np.zeros((N, length), dtype=np.uint8)
    for i in range(length):
        for field in range(8 // plane):
            column = field * length + i
            if column < columns:
                packed[:, i] |= codes[:, column] << (plane * field)
    return packed


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("columns", [128, 1, 7, 8, 64, 100, 127])
def test_every_byte_follows_the_stored_rule(width, columns):
    codes = random_codes(3, columns, [width], seed=columns)
    packed = pack_codes(codes, [width])
    low = 0
    for plane in PLANES[width]:
        part = (codes.numpy() >> low) & ((1 << plane) - 1)
        name = f"codes_b{width}_p{plane}" if columns == 128 else f"tail_p{plane}"
        stored = packed[name][0] if columns == 128 else packed[name]
        assert (stored.numpy() == naive_plane(part, plane)).all()
        low += plane
    assert len(packed) == len(PLANES[width])


def test_golden_bytes_of_a_small_linear():
    """Every width once and a tail; these bytes are format version 1 and never change."""
    widths = (1, 2, 3, 4, 5, 6, 8, 3)
    K = 7 * 128 + 13
    column = torch.arange(K)
    codes = torch.empty(2, K, dtype=torch.uint8)
    for g, (width, columns) in enumerate(zip(widths, group_columns(K), strict=True)):
        k = column[g * 128 : g * 128 + columns]
        for row in range(2):
            codes[row, g * 128 : g * 128 + columns] = ((k * 7 + row * 3 + 1) % (1 << width)).to(
                torch.uint8
            )
    packed = pack_codes(codes, widths)
    digests = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
        for name, tensor in packed.items()
    }
    assert digests == GOLDEN_DIGESTS
    assert packed["tail_p2"].numpy().tobytes().hex() == GOLDEN_TAIL_P2
    assert packed["tail_p1"].numpy().tobytes().hex() == GOLDEN_TAIL_P1
    assert packed["codes_b3_p1"][0, 0].numpy().tobytes().hex() == GOLDEN_B3_P1


def test_golden_bytes_of_zeros():
    zeros = torch.tensor(
        [[15, 0, 9], [3, 1, 2], [7, 5, 2], [15, 8, 1], [31, 1, 16], [63, 2, 33], [255, 128, 7]],
        dtype=torch.uint8,
    )
    packed = {name: t.numpy().tobytes().hex() for name, t in pack_zeros(zeros, WIDTHS).items()}
    assert packed == {
        "zeros_b1": "0f09",
        "zeros_b2": "27",
        "zeros_b3": "af00",
        "zeros_b4": "8f01",
        "zeros_b5": "3f40",
        "zeros_b6": "bf1002",
        "zeros_b8": "ff8007",
    }


@pytest.mark.parametrize("seed", range(12))
def test_codes_and_zeros_round_trip_for_random_shapes_and_mixes(seed):
    rng = np.random.default_rng(seed)
    N, K = int(rng.integers(1, 40)), int(rng.integers(1, 900))
    widths = [int(w) for w in rng.choice(list(PLANES), size=len(group_columns(K)))]
    codes = random_codes(N, K, widths, seed)
    packed = pack_codes(codes, widths)
    assert {name: tuple(t.shape) for name, t in packed.items()} == code_tensor_shapes(N, K, widths)
    assert torch.equal(unpack_codes(packed, widths, N, K), codes)
    zeros = torch.stack(
        [torch.from_numpy(rng.integers(0, 16 if w == 1 else 1 << w, N)) for w in widths]
    ).to(torch.uint8)
    assert torch.equal(unpack_zeros(pack_zeros(zeros, widths), widths, N), zeros)


def test_stored_size_is_exactly_the_code_bits_for_full_groups():
    widths = [1, 2, 3, 4, 5, 6, 8]
    packed = pack_codes(random_codes(5, 7 * 128, widths), widths)
    assert sum(t.numel() for t in packed.values()) == sum(w * 5 * 16 for w in widths)


def test_packing_reads_views_that_are_not_contiguous():
    codes = random_codes(6, 300, [3, 4, 2])
    strided = codes.t().contiguous().t()
    packed, expected = pack_codes(strided, [3, 4, 2]), pack_codes(codes, [3, 4, 2])
    assert all(torch.equal(packed[name], plane) for name, plane in expected.items())


def test_values_that_do_not_fit_are_refused():
    codes = torch.full((2, 128), 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="code 4 does not fit width 2: the largest is 3"):
        pack_codes(codes, [2])
    with pytest.raises(ValueError, match="zero 16 does not fit width 1: the largest is 15"):
        pack_zeros(torch.full((1, 2), 16, dtype=torch.uint8), [1])
    with pytest.raises(ValueError, match="code 4 does not fit width 0: the largest is 0"):
        pack_codes(codes, [0])
    with pytest.raises(ValueError, match="zero 1 does not fit width 0: the largest is 0"):
        pack_zeros(torch.ones(1, 2, dtype=torch.uint8), [0])
    with pytest.raises(ValueError, match="give a uint8 matrix"):
        pack_codes(codes.int(), [3])


def test_damaged_planes_are_refused_by_name():
    packed = pack_codes(random_codes(4, 256, [3, 3]), [3, 3])
    with pytest.raises(ValueError, match="codes_b3_p1 is missing"):
        unpack_codes({"codes_b3_p2": packed["codes_b3_p2"]}, [3, 3], 4, 256)
    packed["codes_b3_p1"] = packed["codes_b3_p1"][:1]
    with pytest.raises(ValueError, match=r"codes_b3_p1 is torch.uint8 of shape \(1, 4, 16\)"):
        unpack_codes(packed, [3, 3], 4, 256)
