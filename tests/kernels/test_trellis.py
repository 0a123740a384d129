"""The trellis code and its search: against definitions, brute force and golden bytes."""

import hashlib
from itertools import product

import numpy as np
import pytest
import torch

from bitmill.quant.rotation import packed_rewrites, signs
from bitmill_kernels.trellis.code import (
    DEVIATION,
    decode_tiles,
    in_sequence,
    positions,
    row_of_values,
    state_values,
    states,
    table,
    tiled,
    to_circles,
    untiled,
    values_per_state,
)
from bitmill_kernels.trellis.encode import (
    best_circle,
    encode_reference,
    encode_tiles,
    load_library,
)
from bitmill_kernels.trellis.group import emphases
from bitmill_kernels.trellis.layout import RATES, circle_shapes, tile_bytes
from bitmill_kernels.trellis.product import (
    Member,
    TrellisProduct,
    TrellisWeight,
    decode_rows,
    per_column,
)
from bitmill_kernels.trellis.product import load_library as product_library

CPU = torch.device("cpu")
LIMITS = {1: 0.275, 2: 0.072, 3: 0.019, 4: 0.0052, 5: 0.00130, 6: 0.00035, 7: 1.0e-4, 8: 3.2e-5}


def random_circles(rate, count=3):
    draw = torch.Generator().manual_seed(rate)
    return torch.randint(0, 256, (count, tile_bytes(rate)), generator=draw, dtype=torch.uint8)


def targets(rate, count=16):
    draw = torch.Generator().manual_seed(rate)
    return torch.randn(count, 256, generator=draw) * DEVIATION[rate]


def emphasized(count):
    """Emphasis [T, 16] of rows that count very differently."""
    importance = torch.rand(16 * count, generator=torch.Generator().manual_seed(count)) ** 4
    return emphases(importance).view(-1, 16)


def squared_error(circles, wanted, rate, emphasis=None):
    error = in_sequence(decode_tiles(circles, rate)).float() - wanted
    if emphasis is not None:
        error *= emphasis[:, row_of_values(wanted.device)]
    return error.square()


def f(u):
    return ((np.uint16(u) & np.uint16(0x8FFF)) ^ np.uint16(0x3B60)).view(np.float16)


@pytest.mark.parametrize("rate", [2, 6])
def test_values_are_sums_of_masked_halves(rate):
    for state in (0, 1, 777, 40000, 65535):
        h = state * 0x962CAE47 % 2**32
        r = int.from_bytes(h.to_bytes(4, "little"), "big")
        pairs = [(h, r), (h >> 16, r >> 16)] if rate <= 4 else [(h, h >> 16)]
        expected = [f(a & 0xFFFF) + f(b & 0xFFFF) for a, b in pairs]
        assert state_values(torch.tensor(state), rate).tolist() == [float(v) for v in expected]


@pytest.mark.parametrize("rate", RATES)
def test_states_are_windows_of_the_circle(rate):
    circles = random_circles(rate)
    V = values_per_state(rate)
    for circle, found in zip(circles, states(circles, rate), strict=True):
        bits = int.from_bytes(bytes(circle.tolist()), "little")
        around = bits | bits << 8 * len(circle)
        assert found.tolist() == [around >> rate * V * t & 0xFFFF for t in range(256 // V)]
    assert torch.equal(to_circles(states(circles, rate), rate), circles)


def test_positions_are_those_of_a_matrix_fragment():
    places = positions(CPU)
    assert sorted(places.tolist()) == list(range(256))
    for lane, register, half in product((0, 5, 31), range(4), range(2)):
        group, thread = lane // 4, lane % 4
        row = group + 8 * (register % 2)
        column = 2 * thread + 8 * (register // 2) + half
        assert places[8 * lane + 2 * register + half] == 16 * row + column


def test_tiles_are_put_together_again():
    W = torch.arange(32 * 48.0).view(32, 48)
    assert torch.equal(tiled(W)[1, 2], W[16:, 32:])
    assert torch.equal(untiled(tiled(W)), W)


def test_the_search_finds_the_best_circle_by_trying_all():
    """16 states, 1 bit a step, 6 steps: 64 circles. Looking at all steps twice finds the seam."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(16, 1, generator=draw)
    x = torch.randn(40, 6, generator=draw)
    circles = torch.tensor(list(product(range(2), repeat=6)))
    windows = torch.stack([torch.roll(circles, -t, 1)[:, :4] for t in range(6)], 1)
    every = (windows << torch.arange(4)).sum(-1)
    emphasis = 0.5 + torch.rand(40, 6, generator=draw)
    costs = (x[:, None] - emphasis[:, None] * values[every, 0]).square().sum(-1)
    path = best_circle(x, values, 1, 3, emphasis)
    assert torch.equal(path[:, 1:] & 7, path[:, :-1] >> 1)
    assert torch.equal(path[:, 0] & 7, path[:, -1] >> 1)
    found = (x - emphasis * values[path, 0]).square().sum(1)
    seam = (every[:, 0] & 7) == (path[:, :1] & 7)
    least = torch.where(seam, costs, torch.inf).amin(1)
    torch.testing.assert_close(found, least)
    assert (found - costs.amin(1)).mean() < 0.05 * costs.mean()


CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]


def take_capability(name, monkeypatch):
    """Have kernels compiled for an older processor than this one may be."""
    own = torch.backends.cpu.get_cpu_capability()
    if own not in CAPABILITIES or CAPABILITIES.index(name) > CAPABILITIES.index(own):
        pytest.skip(f"this processor has {own}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)


@pytest.fixture
def without_halves(monkeypatch):
    """Has the search compiled for a processor without fp16 arithmetic."""
    if load_library() is None:
        pytest.skip("no C++ compiler")

    def take(capability):
        take_capability(capability, monkeypatch)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
        load_library.cache_clear()
        assert load_library() is not None

    yield take
    load_library.cache_clear()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rate", [1, 2, 5])
def test_the_compiled_search_finds_what_the_plain_one_finds(rate, capability, without_halves):
    without_halves(capability)
    wanted = targets(rate, 3)
    for emphasis in (None, emphasized(3)):
        errors = [
            squared_error(encode(wanted, rate, emphasis), wanted, rate, emphasis).sum(1)
            for encode in (encode_tiles, encode_reference)
        ]
        torch.testing.assert_close(errors[0] / errors[1], torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", RATES)
def test_costs_in_halves_of_a_word_lose_next_to_nothing(rate, without_halves):
    if not torch.cpu.get_capabilities().get("avx512_fp16"):
        pytest.skip("this processor does not compute in fp16")
    wanted, choices = targets(rate, 64), (None, emphasized(64))
    halves = [encode_tiles(wanted, rate, emphasis) for emphasis in choices]
    without_halves("AVX512")
    for emphasis, half in zip(choices, halves, strict=True):
        single = encode_tiles(wanted, rate, emphasis)
        assert not torch.equal(half, single)
        errors = [squared_error(one, wanted, rate, emphasis).sum() for one in (half, single)]
        assert errors[0] < 1.004 * errors[1]


@pytest.mark.parametrize("rate", RATES)
def test_distortion_is_near_the_bound(rate):
    wanted = targets(rate, 33)
    circles = encode_tiles(wanted, rate)
    assert circles.shape == (33, tile_bytes(rate))
    error = float(squared_error(circles, wanted, rate).mean()) / DEVIATION[rate] ** 2
    assert 4.0**-rate < error < LIMITS[rate]


@pytest.mark.parametrize("rate", RATES)
def test_rows_of_a_pair_share_their_bits_by_what_they_count(rate):
    """As if each had a rate of its own: the mean of squares falls to the geometric mean."""
    wanted, emphasis = targets(rate, 24), emphasized(24)
    alike = squared_error(encode_tiles(wanted, rate), wanted, rate).mean()
    found = squared_error(encode_tiles(wanted, rate, emphasis), wanted, rate, emphasis).mean()
    assert found < 1.15 * alike
    assert emphasis.square().mean() > 1.4


def test_emphasis_has_a_product_of_1_in_pairs_and_bounds():
    importance = torch.ones(32)
    importance[[0, 1, 2, 19]] = torch.tensor([16.0, 0.0, 4096.0, 1e-6])
    importance[[9, 20, 28]] = 0.0
    found = emphases(importance)
    assert found[[0, 8]].tolist() == [2.0, 0.5]
    assert found[[1, 9, 20, 28]].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert found[[2, 10]].tolist() == [2.0, 0.5]
    assert found[[19, 27]].tolist() == [0.5, 2.0]
    assert emphases(importance * 1e-9)[0] == 2.0


@pytest.mark.parametrize("encode", [*CAPABILITIES, "usual", "plain"])
@pytest.mark.parametrize("rate", [3, 8])
@pytest.mark.parametrize("emphasis", [None, emphasized(2)], ids=["alike", "emphasized"])
def test_targets_far_from_all_values_get_the_nearest(rate, emphasis, encode, without_halves):
    """No cost of theirs overflows, nor spoils what comes behind."""
    if encode in CAPABILITIES:
        without_halves(encode)
    wanted = targets(rate, 2)
    wanted[:, [0, 7, 100, 255]] *= 1e4
    circles = (encode_reference if encode == "plain" else encode_tiles)(wanted, rate, emphasis)
    found = in_sequence(decode_tiles(circles, rate)).float()
    far = wanted.abs() > 100
    assert (found[far] * wanted[far].sign() > 1.5).all()
    assert (found - wanted)[~far].square().median() < LIMITS[rate] * DEVIATION[rate] ** 2


def test_a_few_tiles_are_coded_as_many_are():
    wanted = targets(3, 18)
    assert torch.equal(encode_tiles(wanted, 3)[17:], encode_tiles(wanted[17:], 3))
    assert encode_tiles(wanted[:0], 3).shape == (0, 96)


def test_golden_values():
    """Stored checkpoints depend on every bit of these."""
    digests = {
        rate: hashlib.sha256(table(rate, CPU).half().numpy().tobytes()).hexdigest()[:16]
        for rate in (4, 5)
    }
    decoded = hashlib.sha256(decode_tiles(random_circles(3), 3).numpy().tobytes()).hexdigest()[:16]
    assert (digests[4], digests[5], decoded) == GOLDEN


GOLDEN = ("0c6b487e77f102a6", "359ba2d8f6391017", "38dcaca10ea3179e")


def test_shapes_name_a_tensor_per_rate():
    shapes = circle_shapes(40, 300, (3, 2, 3))
    assert shapes == {
        "codes_r2": (1, 3, 8, 64),
        "codes_r3": (1, 3, 8, 96),
        "codes_tail": (3, 3, 96),
    }
    with pytest.raises(ValueError, match="2 rates for 3 groups"):
        circle_shapes(40, 300, (3, 2))
    with pytest.raises(ValueError, match=r"\[9\]"):
        circle_shapes(40, 300, (3, 9, 3))


def random_weight(N, K, rates):
    """A linear as the kernels take it, and its weights in packed, rotated columns."""
    draw = torch.Generator().manual_seed(N)
    circles = {
        key: torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        for key, shape in circle_shapes(N, K, rates).items()
    }
    rows, groups = (torch.rand(n, generator=draw).half() for n in (N, len(rates)))
    W = decode_rows(circles, rates, K, 0, N) * per_column(groups.float(), K) * rows.float()[:, None]
    return TrellisWeight(circles, rows, groups, rates), W


def random_product(N, K, rates, **source):
    weight, W = random_weight(N, K, rates)
    return TrellisProduct([weight], K, CPU, **source), W


@pytest.fixture(params=["AVX512", "AVX2", "DEFAULT", "torch"])
def way(request, monkeypatch):
    """How products are made: compiled for a capability, or by torch."""
    if request.param == "torch":
        monkeypatch.setenv("BITMILL_CPU_KERNEL", "0")
    else:
        take_capability(request.param, monkeypatch)
    product_library.cache_clear()
    yield request.param
    product_library.cache_clear()


@pytest.mark.parametrize(
    ("N", "K", "rates"),
    [(37, 300, (3, 5, 1)), (16, 128, (2,)), (1, 9, (4,)), (50, 272, (6, 7, 8))],
    ids=str,
)
def test_products_are_those_of_the_decoded_weights(N, K, rates, way):
    product, W = random_product(N, K, rates)
    (member,) = product.members
    torch.testing.assert_close(member.weights(0, N), W)
    torch.testing.assert_close(member.weights(0, min(N, 20)), W[:20])
    for tokens in (*range(1, 9), 20):
        x = torch.randn(tokens, K)
        torch.testing.assert_close(product(x), x @ W.T, atol=1e-4, rtol=1e-4)
        dy = torch.randn(tokens, N)
        torch.testing.assert_close(product.input_gradient(dy), dy @ W, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rates", [(1, 2, 3, 4) * 4, (5, 6, 7, 8) * 4], ids=str)
def test_values_are_those_of_the_code_bit_for_bit(rates, way):
    N, K = 512, 128 * len(rates)
    draw = torch.Generator().manual_seed(0)
    circles = {
        key: torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        for key, shape in circle_shapes(N, K, rates).items()
    }
    ones = [torch.ones(n, dtype=torch.float16) for n in (N, len(rates))]
    found = Member(TrellisWeight(circles, *ones, rates), K, CPU).weights(0, N)
    assert torch.equal(found, decode_rows(circles, rates, K, 0, N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("K", [9, 128, 300])
def test_inputs_in_the_columns_of_the_source_are_ordered_and_rotated(K, ordered, dtype, way):
    N, rates, draw = 20, (3, 6, 2)[: -(-K // 128)], torch.Generator().manual_seed(K)
    order = torch.randperm(K, generator=draw).int() if ordered else None
    rewrites = packed_rewrites("trellis", order)

    def inputs(x):
        for one in rewrites:
            x = one.inputs(x)
        return x

    source = {"order": order, "signs": signs(K, CPU), "inputs": inputs}
    product, W = random_product(N, K, rates, **source)
    for tokens in (1, 3, 8, 9):
        x = torch.randn(tokens, K, generator=draw).to(dtype)
        y = product.of_source(x)
        assert y.dtype == dtype
        near = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(y.float(), inputs(x.float()) @ W.T, atol=near, rtol=near)


@pytest.mark.parametrize("known", [True, False], ids=["signs", "other rotation"])
@pytest.mark.parametrize("K", [9, 300])
def test_linears_of_one_input_are_multiplied_as_one_by_one_and_rotate_it_once(K, known, way):
    outputs = (20, 37, 1, 48)
    mixes = [(3, 6, 2), (8, 1, 5), (2, 2, 2), (4, 7, 3)]
    rates = [mix[: -(-K // 128)] for mix in mixes]
    found = [random_weight(N, K, mix) for N, mix in zip(outputs, rates, strict=True)]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(K)).int()
    rewrites = packed_rewrites("trellis", order)
    seen = []

    def inputs(x):
        seen.append(x)
        for one in rewrites:
            x = one.inputs(x)
        return x

    source = {"order": order, "signs": signs(K, CPU) if known else None, "inputs": inputs}
    weights = [weight for weight, _ in found]
    stack = TrellisProduct(weights, K, CPU, **source)
    alone = [TrellisProduct([weight], K, CPU, **source) for weight in weights]
    assert stack.outputs == outputs
    for tokens in (0, 1, 3, 8, 9, 40):
        x = torch.randn(tokens, K)
        seen.clear()
        y = stack.of_source(x)
        assert len(seen) == (0 if known and tokens <= 8 and way != "torch" else 1)
        assert torch.equal(y, torch.cat([one.of_source(x) for one in alone], 1))
        dy = torch.randn(tokens, sum(outputs))
        W = torch.cat([W for _, W in found])
        torch.testing.assert_close(stack.input_gradient(dy), dy @ W, atol=1e-4, rtol=1e-4)


def test_linears_of_other_columns_share_no_input():
    weights = [random_weight(20, K, rates)[0] for K, rates in ((256, (2, 3)), (300, (2, 3, 4)))]
    with pytest.raises(ValueError, match="a linear has 3 groups: 256 columns are 2"):
        TrellisProduct(weights, 256, CPU)


def test_inputs_near_the_largest_of_fp32_do_not_overflow_on_the_way(way):
    K = 300
    inputs = packed_rewrites("trellis", None)[0].inputs
    product, W = random_product(20, K, (3, 6, 2), signs=signs(K, CPU), inputs=inputs)
    x = signs(K, CPU)[None] * 1e37  # all of a group comes together in one column
    expected = inputs(x.double()) @ W.double().T
    assert float((product.of_source(x) - expected).abs().max() / expected.abs().max()) < 1e-5
    one = torch.zeros(1, K)
    for lost in (torch.nan, torch.inf):
        one[0, 5] = lost
        y, plain = product.of_source(one), inputs(one) @ W.T
        assert torch.equal(y.isfinite(), plain.isfinite())
