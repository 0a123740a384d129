"""The search for trellis codes on a GPU, against the one in torch."""

import pytest
import torch

from bitmill_kernels.trellis.code import DEVIATION, decode_tiles, in_sequence
from bitmill_kernels.trellis.encode import encode_reference, encode_tiles, load_cuda_library
from bitmill_kernels.trellis.layout import RATES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def squared_error(circles, wanted, rate):
    return (in_sequence(decode_tiles(circles, rate)).float() - wanted).square().mean(1)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("count", [1, 7, 150, 1100])
def test_searched_circles_are_as_good_as_those_of_torch(rate, count):
    assert load_cuda_library() is not None
    draw = torch.Generator("cuda").manual_seed(rate)
    wanted = torch.randn(count, 256, device="cuda", generator=draw) * DEVIATION[rate]
    found = encode_tiles(wanted, rate)
    assert torch.equal(encode_tiles(wanted, rate), found)
    few = wanted[-7:]
    ratio = squared_error(found[-7:], few, rate) / squared_error(
        encode_reference(few, rate), few, rate
    )
    assert float(ratio.mean()) < 1.01
    assert float(ratio.amax()) < 1.10
