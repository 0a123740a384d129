"""Expected errors of the trellis code, against what encodings lose."""

import pytest
import torch

from bitmill_kernels.trellis.code import DEVIATION, DISTORTION, decode_tiles, in_sequence
from bitmill_kernels.trellis.encode import encode_tiles
from bitmill_kernels.trellis.errors import expected_errors
from bitmill_kernels.trellis.layout import RATES


def test_at_the_best_size_it_is_the_distortion():
    sizes = torch.tensor([DEVIATION[rate] for rate in RATES])
    found = (expected_errors(sizes, RATES) / sizes.square()).tolist()
    wanted = [DISTORTION[rate] for rate in RATES]
    assert found[:-1] == pytest.approx(wanted[:-1], rel=0.04)
    assert found[-1] < wanted[-1]


@pytest.mark.parametrize("rate", [2, 3, 5])
@pytest.mark.parametrize("size", [0.22, 0.45, 1.3, 1.9, 12.0])
def test_between_and_beyond_what_was_measured(rate, size):
    draw = torch.Generator().manual_seed(rate)
    wanted = torch.randn(64, 256, generator=draw) * DEVIATION[rate] * size
    found = in_sequence(decode_tiles(encode_tiles(wanted, rate), rate)).float()
    lost = float((found - wanted).square().mean())
    [expected] = expected_errors(torch.tensor([DEVIATION[rate] * size]), (rate,)).tolist()
    assert expected == pytest.approx(lost, rel=0.25)


def test_every_group_has_its_own_rate():
    sizes = torch.tensor([[0.0, 1.0, 1.0], [2.0, 2.0, 3.0]])
    found = expected_errors(sizes, (4, 2, 4))
    assert found.isfinite().all()
    assert found[0, 1] == expected_errors(sizes[:, 1:2], (2,))[0, 0]
    assert found[0, 2] < found[0, 1]
    assert found[1, 0] == expected_errors(sizes[:, :1], (4,))[1, 0]
