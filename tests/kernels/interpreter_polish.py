"""Cases for Triton's interpreter: visits of groups against those of `bitmill.solvers.polish`."""

import pytest
import torch
from torch.nn import functional

from bitmill.quant.codes import LinearCodes, group_slices
from bitmill.quant.grid import Grid
from bitmill.solvers.polish import visit_group
from bitmill_kernels.gptq.polish_triton import SCRATCH_COLUMNS, polish_groups_triton
from bitmill_kernels.linalg.split_product import LOW_LEFT, grouped_parts


@pytest.mark.parametrize(("R", "K", "width"), [(5, 128, 3), (34, 301, 2), (3, 1, 1), (32, 320, 8)])
def test_visits_end_where_the_plain_ones_do(R, K, width):
    generator = torch.Generator().manual_seed(R + K)
    x = torch.randn(3 * K, K, generator=generator)
    H = x.T @ x / len(x)
    W = torch.randn(R, K, generator=generator)
    parts = list(group_slices(K))
    reach = [W[:, part].amax(1) - W[:, part].amin(1) for _, part in parts]
    scales = (1.1 * torch.stack(reach) / (2**width - 1)).clamp(min=0.05).half().float()
    lows = torch.stack([W[:, part].amin(1) for _, part in parts])
    zeros = (-lows / scales).round().clamp(0, 2**width - 1)
    scales[:, 0] = 0.0
    widths = (width,) * len(parts)
    before = LinearCodes.nearest(W, Grid(scales, zeros), widths)
    codes, zeros = before.codes, before.zeros
    if K > 2:
        H[2], H[:, 2] = 0.0, 0.0
    slope = (W - before.values()) @ H
    expected, expected_scales = codes.clone(), scales.clone()
    left = slope.clone()
    for group, part in parts:
        expected[:, part], expected_scales[group], change = visit_group(
            codes[:, part],
            left[:, part],
            H[part, part],
            scales[group],
            zeros[group],
            2**width - 1,
        )
        left -= change @ H[part]
    found_scales = scales.clone()
    new = torch.full((K, R), 255, dtype=torch.uint8)
    scratch = torch.full((SCRATCH_COLUMNS, R), float("nan"))
    change = torch.full((3 * K, R), float("nan"), dtype=torch.bfloat16)
    diagonal = H.diagonal()
    within = functional.pad(H, (128, 3), value=float("nan"))
    polish_groups_triton(
        codes.T.contiguous(),
        slope.T.contiguous(),
        within[:, 128:-3],
        grouped_parts(within, LOW_LEFT)[:, 128:-3],
        torch.where(diagonal > 0, 1 / diagonal, 0.0),
        found_scales,
        zeros,
        torch.full((len(parts), R), 2.0**width - 1),
        new,
        scratch,
        change,
    )
    after = LinearCodes(new.T, found_scales, zeros, widths)
    plain = LinearCodes(expected, expected_scales, zeros, widths)
    errors = [(((W - c.values()) @ H) * (W - c.values())).sum(1) for c in (after, plain, before)]
    assert torch.allclose(errors[0], errors[1], rtol=0.03, atol=1e-5)
    assert (errors[0] <= errors[2] * (1 + 1e-5) + 1e-6).all()
    assert (expected == new.T).float().mean() >= 0.99
    assert (expected_scales == found_scales).float().mean() >= 0.97
    moved = (after.values() - before.values()).T
    for _, part in parts:
        high, low, twin = change[3 * part.start : 3 * part.stop].float().chunk(3)
        assert torch.equal(high, twin)
        assert torch.allclose(high + low, moved[part], atol=1e-5)
    assert torch.equal(new.T[0], codes[0])
    assert torch.equal(found_scales, found_scales.half().float())
