import pytest
import torch

from bitmill.calibration.hessian import HessianAccumulator
from bitmill.errors import CalibrationError, NumericalError
from bitmill.solvers.factor import factor


def inputs(T=300, K=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator)
    return torch.randn(T, K, generator=generator) @ mix * torch.rand(K, generator=generator)


def hessian(x):
    accumulator = HessianAccumulator(x.shape[1], "cpu")
    accumulator.add(x)
    return accumulator.mean()


def test_the_mean_does_not_depend_on_the_batches():
    x = inputs()
    accumulator = HessianAccumulator(40, "cpu")
    for part in x.split(37):
        accumulator.add(part)
    expected = x.double().T @ x.double() / 300
    assert torch.allclose(accumulator.mean().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(accumulator.mean(), accumulator.mean().T)
    assert accumulator.tokens == 300


def test_token_weights_weigh_and_their_scale_cancels():
    x, weight = inputs(), torch.rand(300, generator=torch.Generator().manual_seed(1))
    means = []
    for a in (weight, 1000 * weight):
        accumulator = HessianAccumulator(40, "cpu")
        accumulator.add(x[:100], a[:100])
        accumulator.add(x[100:], a[100:])
        means.append(accumulator.mean())
    expected = x.double().T @ (weight.double()[:, None] * x.double()) / weight.double().sum()
    assert torch.allclose(means[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(means[0], means[1], rtol=1e-4, atol=1e-4)
    squares = HessianAccumulator(40, "cpu", diagonal=True)
    squares.add(x[:100], weight[:100])
    squares.add(x[100:], weight[100:])
    torch.testing.assert_close(squares.mean(), means[0].diagonal())


def test_non_finite_tokens_are_named():
    x = inputs(T=50)
    accumulator = HessianAccumulator(40, "cpu", name="layers.1.down_proj")
    accumulator.add(x)
    x[7, 3], x[30, 0] = float("nan"), float("inf")
    accumulator.add(x)
    named = r"^2 of 100 .* inputs to layers\.1\.down_proj: tokens \[57, 80\]"
    check = accumulator.check_later()
    with pytest.raises(CalibrationError, match=named) as error:
        check()
    assert error.value.param == "layers.1.down_proj"


def test_sums_beyond_fp32_are_refused():
    with pytest.raises(NumericalError, match="not finite"):
        factor(torch.full((4, 4), float("inf")))
