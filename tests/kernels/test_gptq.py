import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.gptq.block import gptq_block


def block(R, C, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(R, C, generator=generator)
    x = torch.randn(4 * C, C, generator=generator)
    H = x.t() @ x / (4 * C) + 0.1 * torch.eye(C)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scale = (high - low) / (2**width - 1)
    zero = (-low / scale).round()
    return w, U / U.diagonal()[:, None], scale, zero, 2**width - 1


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("R", "C"), [(5, 128), (64, 128), (1, 1), (7, 100)])
def test_the_fast_loop_gives_the_codes_of_the_plain_one(R, C, width):
    w, u, scale, zero, top = block(R, C, width, seed=width * 1000 + R + C)
    before = w.clone()
    codes, error = gptq_block(w, u, scale, zero, top, backend="reference")
    plain_codes, plain_error = reference.gptq_block(
        w.double(), u.double(), scale.double(), zero.double(), top
    )
    assert torch.equal(w, before)
    assert (codes != plain_codes).float().mean() <= 0.001
    same = (codes == plain_codes).all(1)
    assert torch.allclose(error[same], plain_error[same].float(), atol=1e-4)


def test_error_correction_lowers_the_output_error():
    w, u, scale, zero, top = block(64, 128, 3)
    codes, _ = gptq_block(w, u, scale, zero, top)
    rounded = (w / scale[:, None] + zero[:, None]).round().clamp(0, top)
    U = torch.linalg.inv(u)

    def loss(code):
        return (((w - scale[:, None] * (code - zero[:, None])) @ U) ** 2).sum()

    assert loss(codes.float()) < loss(rounded)


def test_a_row_without_range_gets_code_and_value_zero():
    w, u, scale, zero, top = block(4, 128, 3)
    scale[1] = 0.0
    zero[1] = 5.0
    codes, error = gptq_block(w, u, scale, zero, top)
    assert not codes[1].any()
    expected = w[1].clone()
    for j in range(128):
        expected[j + 1 :] -= expected[j] * u[j, j + 1 :]
    assert torch.allclose(error[1], expected, atol=1e-4)


def test_shapes_that_do_not_match_are_refused():
    w, u, scale, zero, top = block(4, 128, 3)
    with pytest.raises(ValueError, match=r"u as \[C, C\]"):
        gptq_block(w[:, :64], u, scale, zero, top)
