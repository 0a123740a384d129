import torch

from bitmill.quant.codes import LinearCodes, group_slices, output_error
from bitmill.quant.grid import ClipSettings
from bitmill.quant.rewrites import Rewrites
from bitmill.solvers.rtn import round_to_nearest


def test_groups_are_128_columns_and_the_tail():
    assert [(g, p.start, p.stop) for g, p in group_slices(300)] == [
        (0, 0, 128),
        (1, 128, 256),
        (2, 256, 300),
    ]


def test_the_stored_form_has_the_same_values_in_source_order():
    W = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    codes = round_to_nearest(W[:, order], (1, 3, 8), None, ClipSettings())
    stored = codes.finish().rewritten(Rewrites.of_order(order))
    assert isinstance(codes, LinearCodes)
    assert stored.widths == (1, 3, 8)
    assert torch.equal(stored.dequantize()[:, order], codes.values())
    assert torch.equal(codes.finish().dequantize(), codes.values())


def test_the_output_error_is_the_mean_over_tokens():
    generator = torch.Generator().manual_seed(2)
    x, R = torch.randn(50, 7, generator=generator), torch.randn(3, 7, generator=generator)
    expected = (x.double() @ R.double().T).square().sum(1).mean()
    assert abs(output_error(R, x.T @ x / 50) - float(expected)) < 1e-4 * float(expected)
