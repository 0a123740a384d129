import pytest
import torch

from bitmill.quant.grid import ClipSettings
from solving import quantize_rtn


def layer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = 0.05 * torch.randn(12, 200, generator=generator)
    x = torch.randn(500, 200, generator=generator) * torch.rand(200, generator=generator) ** 2
    return W, x.T @ x / 500


def test_min_max_rounding_is_the_textbook_formula():
    W, _ = layer()
    weight, _ = quantize_rtn(W, (3, 4), clip=ClipSettings.min_max())
    for part, width in ((slice(0, 128), 3), (slice(128, 200), 4)):
        w = W[:, part].double()
        lo, hi = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        scale = ((hi - lo) / (2**width - 1)).half().double()
        zero = (-lo / ((hi - lo) / (2**width - 1))).round()
        code = (w / scale[:, None] + zero[:, None]).round().clamp(0, 2**width - 1)
        expected = scale[:, None] * (code - zero[:, None])
        same = torch.isclose(weight.dequantize()[:, part].double(), expected, atol=1e-6)
        assert same.float().mean() > 0.999


def test_the_clip_search_weighs_by_the_hessian():
    W, H = layer()
    with_h, result = quantize_rtn(W, (2, 2), H=H)
    without, _ = quantize_rtn(W, (2, 2))

    def loss(weight):
        R = W - weight.dequantize()
        return float((R.square() * H.diagonal()).sum())

    assert loss(with_h) < 0.98 * loss(without)
    plain = quantize_rtn(W, (2, 2), H=H, clip=ClipSettings.min_max())[1]
    assert result.relative_error < plain.relative_error


def test_the_order_decides_the_groups_and_is_undone():
    W, H = layer()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    ordered, _ = quantize_rtn(W, (3, 2), H=H, order=order)
    plain, _ = quantize_rtn(W[:, order], (3, 2), H=H[order][:, order])
    assert torch.equal(ordered.codes, plain.codes)
    assert torch.equal(ordered.dequantize()[:, order], plain.dequantize())


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 8])
def test_more_bits_leave_less_error(width):
    W, H = layer()
    error = quantize_rtn(W, (width, width), H=H)[1].relative_error
    assert error < {1: 0.5, 2: 0.2, 3: 0.05, 4: 0.012, 5: 0.003, 6: 8e-4, 8: 5e-5}[width]
