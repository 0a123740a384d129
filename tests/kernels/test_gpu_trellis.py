"""The search for trellis codes and products with them on a GPU, against those in torch."""

import pytest
import torch

from bitmill.inference.linear import join_siblings
from bitmill.inference.trellis import TrellisLinear, TrellisRuntime
from bitmill.quant.rotation import packed_rewrites
from bitmill.quant.trellis import TrellisTensor
from bitmill_kernels.trellis import batch_cuda, decode_cuda, group_cuda
from bitmill_kernels.trellis.code import DEVIATION, decode_tiles, in_sequence, row_of_values
from bitmill_kernels.trellis.encode import encode_reference, encode_tiles
from bitmill_kernels.trellis.group import (
    Feedback,
    emphases,
    encode_group,
    encode_group_reference,
)
from bitmill_kernels.trellis.layout import RATES, circle_shapes
from bitmill_kernels.trellis.product import Member
from bitmill_kernels.trellis.product_cuda import FUSED_TOKENS, available
from trellis_models import random_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def squared_error(circles, wanted, rate, emphasis=None):
    error = in_sequence(decode_tiles(circles, rate)).float() - wanted
    if emphasis is not None:
        error *= emphasis[:, row_of_values(wanted.device)]
    return error.square().mean(1)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("count", [1, 7, 150, 1100])
def test_searched_circles_are_as_good_as_those_of_torch(rate, count):
    assert group_cuda.available()
    draw = torch.Generator("cuda").manual_seed(rate)
    wanted = torch.randn(count, 256, device="cuda", generator=draw) * DEVIATION[rate]
    importance = torch.rand(16 * count, device="cuda", generator=draw) ** 3
    for emphasis in (None, emphases(importance).view(-1, 16)):
        found = encode_tiles(wanted, rate, emphasis)
        assert torch.equal(encode_tiles(wanted, rate, emphasis), found)
        few, counts = wanted[-7:], None if emphasis is None else emphasis[-7:]
        plain = encode_reference(few, rate, counts)
        ratio = squared_error(found[-7:], few, rate, counts)
        ratio /= squared_error(plain, few, rate, counts)
        assert float(ratio.mean()) < 1.01
        assert float(ratio.amax()) < 1.10


@pytest.mark.parametrize("rates", [(3, 3, 3), (2, 3, 4), (5, 8, 1)], ids=str)
def test_groups_leave_the_errors_that_the_plain_version_leaves(rates):
    draw = torch.Generator("cuda").manual_seed(0)
    W = torch.randn(208, 100, device="cuda", generator=draw)
    step = 0.7 + 0.2 * torch.rand(208, device="cuda", generator=draw)
    upper = torch.eye(112, device="cuda")
    upper += 0.2 * torch.randn(112, 112, device="cuda", generator=draw).triu(1)
    upper[100:] = torch.eye(112, device="cuda")[100:]
    tiles = [slice(i, i + 16) for i in range(0, 112, 16)]
    inverses = torch.stack([torch.linalg.inv(upper[part, part]) for part in tiles])
    feedback = Feedback(upper[:100, :100], inverses)
    rows = [slice(0, 96), slice(96, 160), slice(160, 208)]
    emphasis = emphases(torch.rand(208, device="cuda", generator=draw))
    given = W, step, emphasis, feedback, rows, rates
    found, again = encode_group(*given), encode_group(*given)
    plain = encode_group_reference(*given)
    assert torch.equal(found.missed, again.missed)
    for i, mine in enumerate(rows):
        assert torch.equal(found.circles[i], again.circles[i])
        assert found.circles[i].shape == plain.circles[i].shape
        counts = (emphasis / step)[mine, None]
        errors = [(counts * one.missed[mine]).square().mean() for one in (found, plain)]
        assert 0.99 < float(errors[0] / errors[1]) < 1.01


def assert_right_and_repeatable(kernel, W, tokens, dtype, draw):
    """Of random activations; W f64 [N, K]."""
    x = torch.randn(tokens, W.shape[1], generator=draw).to(dtype)
    expected = x.double() @ W.T
    y = kernel(x.cuda())
    assert all(torch.equal(kernel(x.cuda()), y) for _ in range(5))
    error = (y.cpu().double() - expected).norm() / expected.norm()
    assert error < {torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "rates"),
    [
        (37, 300, (3, 5, 1)),
        (16, 128, (2,)),
        (1, 9, (4,)),
        (50, 272, (6, 7, 8)),
        (256, 2176, (1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 2, 3, 4, 2, 3, 4)),
    ],
    ids=lambda value: str(value)[:12],
)
def test_products_are_those_of_the_decoded_weights(N, K, rates, dtype):
    draw = torch.Generator().manual_seed(N)
    weight = random_linear(N, K, rates, draw)
    W = weight.dequantize().double()
    module = TrellisLinear.from_packed(weight).cuda()
    assert available(), "the kernels were not built: see the log"
    inner = weight.packed_values()
    member = Member(weight.kernel_weight(), K, torch.device("cpu"))
    torch.testing.assert_close(member.weights(0, N), inner)
    for tokens in (1, 2, 7, 8, 9, 16, 31, 33, 100):
        x = torch.randn(tokens, K, generator=draw).to(dtype)
        expected = x.double() @ W.T
        y = module(x.cuda())
        assert y.dtype == dtype
        assert torch.equal(module(x.cuda()), y)
        error = (y.cpu().double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    decoded = module._runtime.product.members[0].weights(0, N)
    torch.testing.assert_close(decoded.cpu(), inner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "rates"),
    [(37, 300, (3, 5, 1)), (50, 131, (6, 2)), (1000, 1100, (2, 3, 4, 1, 3, 2, 7, 8, 4))],
    ids=lambda value: str(value)[:12],
)
def test_products_by_decoded_rows_are_those_of_the_weights(N, K, rates, dtype):
    draw = torch.Generator().manual_seed(N)
    weight = random_linear(N, K, rates, draw)
    product = TrellisRuntime([weight], torch.device("cuda")).product
    for tokens in (0, 1, 40):
        x = torch.randn(tokens, K, generator=draw).to(dtype)
        y = product.by_decoded_rows(x.cuda())
        expected = x.double() @ weight.dequantize().double().T
        assert y.shape == expected.shape
        error = (y.cpu().double() - expected).norm()
        bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert error <= bound * expected.norm()
    rows = slice(16, min(N, 43))
    decoded = product.members[0].weights(rows.start, rows.stop)
    torch.testing.assert_close(decoded.cpu(), weight.packed_values()[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "rates"),
    [(37, 300, (3, 5, 1)), (272, 272, (6, 7, 8)), (1000, 1100, (2, 3, 4, 1, 3, 2, 5, 3, 4))],
    ids=lambda value: str(value)[:12],
)
def test_every_shape_of_the_batch_kernel_is_right_and_repeatable(N, K, rates, dtype):
    if not batch_cuda.available(torch.device("cuda")):
        pytest.skip("the batch kernel needs Hopper and nvcc")
    draw = torch.Generator().manual_seed(N)
    weight = random_linear(N, K, rates, draw)
    W = weight.dequantize().double()
    runtime = TrellisRuntime([weight], torch.device("cuda"))
    for tile, shapes in batch_cuda.SHAPES.items():
        for shape in shapes:
            if batch_cuda.plan(rates, shape, tile) is None:
                continue
            kernel = runtime.product.batch({tile: shape})
            for tokens in (1, 7, tile, tile + 3, 150):
                assert_right_and_repeatable(kernel, W, tokens, dtype, draw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "rates"),
    [
        (37, 300, (3, 5, 1)),
        (272, 272, (6, 7, 8)),
        (1000, 1100, (2, 3, 4, 1, 3, 2, 5, 3, 4)),
        (9000, 1024, (2, 3, 4, 3, 2, 3, 4, 3)),
    ],
    ids=lambda value: str(value)[:12],
)
def test_every_shape_of_the_decode_kernel_is_right_and_repeatable(N, K, rates, dtype):
    if not decode_cuda.available(torch.device("cuda")):
        pytest.skip("the decode kernel of trellis codes needs Hopper and nvcc")
    draw = torch.Generator().manual_seed(N)
    weight = random_linear(N, K, rates, draw)
    W = weight.dequantize().double()
    runtime = TrellisRuntime([weight], torch.device("cuda"))
    for shape in decode_cuda.SHAPES:
        kernel = runtime.product.decode(shape)
        for tokens in (1, 2, 3, 7, 8, 9, 16):
            assert_right_and_repeatable(kernel, W, tokens, dtype, draw)


STACKS = [
    ((37, 16, 5), 300, [(3, 5, 1), (2, 2, 8), (6, 4, 7)]),
    ((272, 64, 64), 272, [(6, 7, 8), (1, 2, 3), (3, 3, 3)]),
    ((4096, 1024, 1024), 1024, [(2, 3, 4, 3) * 2, (4, 3, 3, 2) * 2, (5, 1, 3, 3) * 2]),
    ((3000, 3000), 1100, [(2, 3, 4, 1, 3, 2, 5, 3, 4), (3,) * 9]),
]
"""Rows, columns and rates of linears that share an input."""


def random_stack(outputs, K, mixes, draw):
    """Linears of one column order, and their weights f64 [N, K] one below the other."""
    order = torch.randperm(K, generator=draw).int()
    weights = [random_linear(N, K, own, draw, order) for N, own in zip(outputs, mixes, strict=True)]
    return weights, torch.cat([weight.dequantize() for weight in weights]).double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "K", "mixes"), STACKS, ids=lambda value: str(value)[:12])
def test_every_kernel_multiplies_linears_of_one_input_together(outputs, K, mixes, dtype):
    draw = torch.Generator().manual_seed(K)
    weights, W = random_stack(outputs, K, mixes, draw)
    product = TrellisRuntime(weights, torch.device("cuda")).product
    kernels = [(product.fused, (1, 8, 9, FUSED_TOKENS)), (product.by_decoded_rows, (1, 40))]
    if decode_cuda.available(torch.device("cuda")):
        kernels += [(product.decode(shape), (1, 3, 8, 16)) for shape in decode_cuda.SHAPES]
    if batch_cuda.available(torch.device("cuda")):
        rates = [rate for own in mixes for rate in own]
        kernels += [
            (product.batch({tile: shape}), (1, tile, tile + 3))
            for tile, shapes in batch_cuda.SHAPES.items()
            for shape in shapes
            if batch_cuda.plan(rates, shape, tile) is not None
        ]
    for kernel, counts in kernels:
        for tokens in counts:
            x = torch.randn(tokens, K, generator=draw).to(dtype)
            y = kernel(x.cuda())
            assert all(torch.equal(kernel(x.cuda()), y) for _ in range(3))
            for found, own in zip(y.split(outputs, 1), W.split(outputs), strict=True):
                expected = x.double() @ own.T
                error = (found.cpu().double() - expected).norm() / expected.norm()
                assert error < {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "K", "mixes"), STACKS, ids=lambda value: str(value)[:12])
def test_modules_of_one_input_give_their_own_outputs_and_one_gradient(outputs, K, mixes, dtype):
    draw = torch.Generator().manual_seed(K)
    weights, W = random_stack(outputs, K, mixes, draw)
    modules = [TrellisLinear.from_packed(weight) for weight in weights]
    for module in modules[1:]:
        module.share_order(modules[0].order)
    names = ("q_proj", "k_proj", "v_proj")
    join_siblings(
        (f"model.layers.0.self_attn.{name}", module)
        for name, module in zip(names, modules, strict=False)
    )
    assert modules[0].siblings is modules[-1].siblings is not None
    near = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for tokens in (1, 16, 100):
        x = torch.randn(tokens, K, generator=draw).to(dtype)
        on_gpu = x.cuda().requires_grad_()
        outputs_found = [module(on_gpu) for module in modules]
        torch.cat(outputs_found, 1).sum().backward()
        for found, own in zip(outputs_found, W.split(outputs), strict=True):
            expected = x.double() @ own.T
            assert (found.cpu().double() - expected).norm() < near * expected.norm()
        gradient = on_gpu.grad.cpu().double() - W.sum(0)
        assert gradient.norm() < near * W.sum(0).expand(tokens, K).norm()
    assert all(module._runtime is None for module in modules)


def test_inputs_beyond_half_precision_keep_their_size():
    rates = (3, 2)
    circles = {
        key: torch.randint(0, 256, shape, dtype=torch.uint8)
        for key, shape in circle_shapes(64, 256, rates).items()
    }
    scales = torch.full((64,), 1e-4).half(), torch.ones(2).half()
    weight = TrellisTensor(64, 256, rates, circles, *scales, packed_rewrites("trellis", None))
    module = TrellisLinear.from_packed(weight).cuda()
    x = torch.randn(2, 256).bfloat16() * 1e6
    expected = x.double() @ weight.dequantize().double().T
    error = (module(x.cuda()).cpu().double() - expected).norm() / expected.norm()
    assert error < 8e-3
