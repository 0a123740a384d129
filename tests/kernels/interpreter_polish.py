"""Cases for Triton's interpreter: a group's visit against the plain one of `bitmill.polish`."""

import pytest
import torch

from bitmill.codes import LinearCodes
from bitmill.polish import visit_group
from bitmill_kernels.polish_triton import polish_group_triton


@pytest.mark.parametrize(("R", "C", "width"), [(5, 128, 3), (18, 70, 2), (3, 1, 1)])
def test_a_visit_ends_where_the_plain_one_does(R, C, width):
    generator = torch.Generator().manual_seed(R + C)
    x = torch.randn(3 * C, C, generator=generator)
    H = x.T @ x / len(x)
    W = torch.randn(R, C, generator=generator)
    scale = (1.1 * (W.amax(1) - W.amin(1)) / (2**width - 1)).clamp(min=0.05).half().float()
    zero = (-W.amin(1) / scale).round().clamp(0, 2**width - 1)
    scale[0] = 0.0
    codes = (W / scale.clamp(min=0.1)[:, None] + zero[:, None]).round().clamp(0, 2**width - 1)
    codes = codes.to(torch.uint8)
    if C > 2:
        H[2], H[:, 2] = 0.0, 0.0
    residual = W - scale[:, None] * (codes.float() - zero[:, None])
    slope = residual @ H
    expected = visit_group(codes, slope, H, scale, zero, 2**width - 1)
    found_scale = scale.clone()
    new = torch.full((C, R), 255, dtype=torch.uint8)
    change = torch.full((C, R), float("nan"))
    diagonal = H.diagonal()
    polish_group_triton(
        codes.T.contiguous(),
        slope.T.contiguous(),
        H,
        torch.where(diagonal > 0, 1 / diagonal, 0.0),
        found_scale,
        zero,
        torch.full((R,), 2.0**width - 1),
        new,
        change,
    )
    after = residual - change.T
    plain = residual - expected[2]
    errors = [((r @ H) * r).sum(1) for r in (after, plain, residual)]
    assert torch.allclose(errors[0], errors[1], rtol=0.02, atol=1e-5)
    assert (errors[0] <= errors[2] * (1 + 1e-5) + 1e-6).all()
    assert (expected[0] == new.T).float().mean() >= 0.98
    live = LinearCodes(new.T, found_scale[None], zero[None], (width,)).values()
    before = LinearCodes(codes, scale[None], zero[None], (width,)).values()
    assert torch.allclose(change.T, live - before, atol=1e-5)
    assert torch.equal(new.T[0], codes[0])
    assert torch.equal(found_scale, found_scale.half().float())
