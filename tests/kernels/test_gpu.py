"""Kernels on a CUDA device against fp64; every output is poisoned before it is written."""

from contextlib import suppress

import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.gptq.block import gptq_block
from bitmill_kernels.hopper.building import HOPPER
from bitmill_kernels.layout import WIDTHS
from bitmill_kernels.linalg.hessian import hessian_update
from bitmill_kernels.matmul import batch_cuda, cuda_library, tiles
from bitmill_kernels.matmul.decode_cuda import SHAPES, TOKEN_BUCKETS, CudaDecoder, DecodeShape
from bitmill_kernels.matmul.decode_triton import TOKEN_TILES, Tile, TritonDecoder
from bitmill_kernels.matmul.linear import MixedLinear
from bitmill_kernels.matmul.runtime import PackedWeight, build_runtime, dequantize_runtime
from bitmill_kernels.pack import pack_codes, pack_zeros
from kernel_cases import random_planes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda")
MIXED = (3, 2, 4, 8, 1, 3, 6, 5, 3)
NARROW = (3, 2, 4, 4, 1, 3, 3, 2, 3)


def the_same_again(product, x, bias, times):
    """y [T, N] of a product that gives the same bits so many times, into memory that holds NaN."""
    results = []
    for _ in range(times):
        y = torch.full((len(x), len(bias)), float("nan"), dtype=x.dtype, device=GPU)
        product(x, bias, y)
        results.append(y)
    assert all(torch.equal(results[0], y) for y in results)
    return results[0]


def exact(x, weight, bias=None):
    inputs = x.double() if weight.order is None else x.double()[:, weight.order.long()]
    y = inputs @ dequantize_runtime(weight).double().t()
    return y if bias is None else y + bias.double()


def relative_error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


def decoders(weight, T, **options):
    bucket = next(bucket for bucket in TOKEN_BUCKETS if bucket >= T)
    found = []
    for shape in SHAPES[bucket]:
        if all(member.rows % shape.rows == 0 for member in weight.members):
            with suppress(ValueError):
                found.append(CudaDecoder(weight, {bucket: shape}, **options))
    assert found
    return found


@pytest.fixture
def compiled():
    if not cuda_library.available(GPU):
        pytest.skip("the CUDA kernel needs Hopper or later and nvcc")


@pytest.mark.parametrize("T", [1, 2, 3, 8, 9, 16, 17, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_launch_shape_is_right_and_repeatable(compiled, T, dtype):
    packed = random_planes(1000, 1100, MIXED, GPU, ordered=True)
    weight = build_runtime([packed], GPU)
    x = (torch.randn(T, 1100, device=GPU) + 0.5).to(dtype)
    bias = torch.randn(1000, device=GPU).to(dtype)
    expected = exact(x, weight, bias)
    for decoder in decoders(weight, T):
        y = the_same_again(decoder, x, bias, times=20)
        assert relative_error(y, expected) < (1e-3 if dtype == torch.float16 else 5e-3)


@pytest.mark.parametrize("T", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("ordered", [False, True], ids=["source", "moved"])
def test_blocks_that_convert_for_themselves_give_the_bits_of_the_prologue(
    compiled, T, dtype, ordered
):
    weight = build_runtime([random_planes(1000, 1100, MIXED, GPU, ordered=ordered)], GPU)
    whole = (torch.randn(T, 1104, device=GPU) + 0.5).to(dtype)
    bias = torch.randn(1000, device=GPU).to(dtype)
    for x in (whole[:, :1100], whole[:, 3:1103]):  # the second is not aligned
        expected = exact(x, weight, bias)
        ways = decoders(weight, T, fused={8: (1000, 4000)}), decoders(weight, T, fused={})
        for own, once in zip(*ways, strict=True):
            y = the_same_again(own, x, bias, times=10)
            assert torch.equal(y, the_same_again(once, x, bias, times=2))
            assert relative_error(y, expected) < (1e-3 if dtype == torch.float16 else 5e-3)


def test_a_launch_shape_keeps_blocks_from_converting(compiled):
    weight = build_runtime([random_planes(1000, 1100, MIXED, GPU)], GPU)
    x = torch.randn(2, 1100, device=GPU).half()
    bias = torch.randn(1000, device=GPU).half()
    own, once = (CudaDecoder(weight, {2: DecodeShape(4, 1, 4, f)}) for f in (True, False))
    assert own.converts(2)
    assert not once.converts(1)
    assert torch.equal(the_same_again(own, x, bias, 5), the_same_again(once, x, bias, 5))


@pytest.mark.parametrize("T", [1, 9, 30, 64])
def test_every_token_tile_of_triton_is_right_and_repeatable(T):
    weight = build_runtime([random_planes(1000, 1100, NARROW, GPU, ordered=True)], GPU)
    x = torch.randn(T, 1100, device=GPU).half() + 0.5
    bias = torch.randn(1000, device=GPU).half()
    shapes = {tokens: Tile(64, 2, 4, 2) for tokens in TOKEN_TILES}
    y = the_same_again(TritonDecoder(weight, shapes, asm=True), x, bias, times=10)
    assert relative_error(y, exact(x, weight, bias)) < 1e-3


@pytest.mark.parametrize("T", [1, 16, 17, 64, 65, 128, 300])
@pytest.mark.parametrize("widths", [MIXED, NARROW], ids=["mixed", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_shape_for_batches_is_right_and_repeatable(compiled, T, widths, dtype):
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("wgmma needs Hopper")
    weight = build_runtime([random_planes(1000, 1100, widths, GPU, ordered=True)], GPU)
    x = (torch.randn(T, 1100, device=GPU) + 0.5).to(dtype)
    bias = torch.randn(1000, device=GPU).to(dtype)
    expected = exact(x, weight, bias)
    for tokens, shapes in batch_cuda.SHAPES.items():
        for shape in shapes:
            if batch_cuda.plan(weight, shape, tokens) is None:
                continue
            product = batch_cuda.CudaBatch(weight, {tokens: shape})
            y = the_same_again(product, x, bias, times=10)
            limit = 6e-4 if dtype == torch.float16 else 5e-3
            assert relative_error(y, expected) < limit, (shape, tokens)


@pytest.mark.parametrize("T", [257, 300, 511, 900])
@pytest.mark.parametrize("ordered", [False, True], ids=["source", "moved"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_batches_larger_than_a_launch(compiled, T, ordered, dtype):
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("wgmma needs Hopper")
    weight = build_runtime([random_planes(1000, 1100, NARROW, GPU, ordered=ordered)], GPU)
    product = batch_cuda.CudaBatch(weight, tiles.batch_shapes(weight))
    whole = (torch.randn(T, 1101, device=GPU) + 0.5).to(dtype)
    bias = torch.randn(1000, device=GPU).to(dtype)
    for x in (whole[:, :1100], whole[:, 1:]):  # the second is not aligned
        y = the_same_again(product, x, bias, times=5)
        limit = 6e-4 if dtype == torch.float16 else 5e-3
        assert relative_error(y, exact(x, weight, bias)) < limit


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_for_batches_go_on_from_unit_to_unit(compiled, width):
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("wgmma needs Hopper")
    weight = build_runtime([random_planes(4096, 8192, (width,) * 64, GPU)], GPU)
    for tokens, shapes in batch_cuda.SHAPES.items():
        x = torch.randn(tokens, 8192, device=GPU, dtype=torch.float16)
        expected = exact(x, weight)
        for shape in shapes:
            if batch_cuda.plan(weight, shape, tokens) is None:
                continue
            y = torch.full((tokens, 4096), float("nan"), dtype=torch.float16, device=GPU)
            batch_cuda.CudaBatch(weight, {tokens: shape})(x, None, y)
            assert relative_error(y, expected) < 6e-4, shape


@pytest.mark.parametrize("backend", ["compiled", "triton"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_code_of_every_field_is_exact(width, backend, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr(cuda_library, "available", lambda device: False)
    codes = torch.arange(256).remainder(1 << width).to(torch.uint8).roll(3).repeat(256, 1)
    tensors = pack_codes(codes, [width] * 2)
    tensors |= pack_zeros(torch.zeros(2, 256, dtype=torch.uint8), [width] * 2)
    tensors["scales"] = torch.ones(2, 256, dtype=torch.float16)
    linear = MixedLinear([PackedWeight(tensors, (width,) * 2, 256, 256)], GPU)
    one_hot = torch.eye(256, dtype=torch.float16, device=GPU)
    for tokens in (1, 4, 16, 32, 64, 256):
        y = torch.cat([linear(part) for part in one_hot.split(tokens)])
        assert torch.equal(y.t().cpu().to(torch.uint8), codes)


@pytest.mark.parametrize("T", [1, 16, 17, 40, 64, 65, 300])
def test_every_range_of_tokens(T):
    packed = random_planes(1000, 1100, MIXED, GPU, ordered=True)
    x = torch.randn(T, 1100, device=GPU, dtype=torch.bfloat16)
    expected = exact(x, build_runtime([packed], GPU))
    assert relative_error(MixedLinear([packed], GPU)(x), expected) < 5e-3


def test_single_precision_inputs_stay_in_single_precision():
    packed = random_planes(300, 700, (3, 2, 4, 8, 1, 5), GPU)
    x = torch.randn(3, 700, device=GPU)
    expected = exact(x, build_runtime([packed], GPU))
    assert relative_error(MixedLinear([packed], GPU)(x), expected) < 1e-5


def test_stacked_siblings():
    q = random_planes(512, 1024, (3, 2, 4, 3, 3, 2, 2, 4), GPU, ordered=True)
    k = random_planes(130, 1024, (2, 2, 3, 5, 3, 1, 2, 4), GPU)
    k = PackedWeight(k.tensors, k.widths, k.N, k.K, q.order)
    stack = MixedLinear([q, k], GPU)
    x = torch.randn(2, 1024, device=GPU, dtype=torch.float16)
    assert relative_error(stack(x), exact(x, build_runtime([q, k], GPU))) < 1e-3


def test_graph_replays_equal_eager_calls_beside_a_busy_stream():
    linear = MixedLinear([random_planes(4096, 4096, (3, 2, 4, 3) * 8, GPU)], GPU)
    x = torch.randn(1, 4096, device=GPU, dtype=torch.float16)
    linear(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    other = torch.cuda.Stream()
    big = torch.randn(4096, 4096, device=GPU)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        expected = linear(x).clone()
        y.fill_(float("nan"))
        with torch.cuda.stream(other):
            big @ big
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


def test_offsets_past_two_to_the_31():
    N, K = 270_000, 8192
    packed = random_planes(N, K, (8,) * 64, GPU)
    last = {
        name: tensor[:, -256:].contiguous()
        for name, tensor in packed.tensors.items()
        if name != "zeros_b8"
    }
    last["zeros_b8"] = packed.tensors["zeros_b8"][:, -256:].contiguous()
    small = build_runtime([PackedWeight(last, packed.widths, 256, K)], GPU)
    linear = MixedLinear([packed], GPU)
    for T in (1, 33, 100):
        x = torch.randn(T, K, device=GPU, dtype=torch.float16)
        assert relative_error(linear(x)[:, -256:], exact(x, small)) < 1e-3


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_torch_compile_keeps_the_operator():
    linear = MixedLinear([random_planes(256, 512, (3, 2, 4, 3), GPU)], GPU)
    x = torch.randn(2, 512, device=GPU, dtype=torch.float16)
    compiled = torch.compile(lambda value: linear(value * 2) + 1, fullgraph=True)
    assert torch.allclose(compiled(x), linear(x * 2) + 1, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("C", [128, 64, 100])
def test_gptq_codes_equal_those_of_the_plain_loop(C):
    w = torch.randn(300, C, device=GPU)
    u = torch.eye(C, device=GPU) + 0.1 * torch.randn(C, C, device=GPU).triu(1)
    scale = (w.amax(1) - w.amin(1)) / 7
    zero = (-w.amin(1) / scale).round()
    codes, error = gptq_block(w, u, scale, zero, 7)
    plain, plain_error = reference.gptq_block(
        w.double(), u.double(), scale.double(), zero.double(), 7
    )
    assert (codes != plain).float().mean() <= 0.001
    same = (codes == plain).all(1)
    assert torch.allclose(error[same].double(), plain_error[same], atol=1e-4)


@pytest.mark.parametrize("K", [384, 2304])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessian_sums_match_double_precision(dtype, K):
    x = (torch.randn(3000, K, device=GPU) + 1.0).to(dtype)
    H, expected = torch.zeros(K, K, device=GPU), torch.zeros(K, K, device=GPU).double()
    for part in x.split(2000):
        hessian_update(H, part)
    reference.hessian_update(expected, x)
    # the tensor cores truncate their fp32 sums, which all have one sign here
    assert relative_error(H.triu(), expected.triu()) < (1e-5 if dtype == torch.float32 else 3e-5)


@pytest.mark.parametrize("K", [384, 2304])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weighted_hessian_sums_are_as_near_as_bf16_inputs(dtype, K):
    """Weights as small as squared gradients are, which fp16 could not hold."""
    torch.manual_seed(0)
    x = torch.randn(3000, K, device=GPU).to(dtype)
    weight = 1e-12 * torch.rand(3000, device=GPU)
    H, expected = torch.zeros(K, K, device=GPU), torch.zeros(K, K, device=GPU).double()
    for part, weights in zip(x.split(2000), weight.split(2000), strict=True):
        hessian_update(H, part, weights)
    reference.hessian_update(expected, x, weight)
    error = (H.double() - expected)[torch.ones_like(H).triu().bool()] / expected.diagonal().mean()
    # of eight draws at most 5.1e-5 and, the largest of 2.7 million, 4.97e-4
    assert error.square().mean().sqrt() < (1e-6 if dtype == torch.float32 else 5.5e-5)
    assert error.abs().max() < (1e-5 if dtype == torch.float32 else 6e-4)
    diagonal = H.diagonal().double() / expected.diagonal()
    assert (diagonal - 1).abs().max() < (1e-5 if dtype == torch.float32 else 5e-4)
