import pytest
import torch

from bitmill.calibration.hessian import HessianAccumulator
from bitmill.errors import NumericalError
from bitmill.solvers import factor as factor_module
from bitmill.solvers.factor import activation_order, factor, mirrored, squared_pivots


def inputs(T=300, K=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator)
    return torch.randn(T, K, generator=generator) @ mix * torch.rand(K, generator=generator)


def hessian(x):
    accumulator = HessianAccumulator(x.shape[1], "cpu")
    accumulator.add(x)
    return accumulator.mean()


@pytest.mark.parametrize("K", [1, 40, 300, 700])
def test_the_upper_triangle_is_mirrored_in_place(K):
    H = torch.randn(K, K, generator=torch.Generator().manual_seed(K))
    upper = H.triu()
    assert mirrored(H) is H
    assert torch.equal(H, upper + upper.triu(1).T)


def test_the_factor_inverts_the_damped_hessian():
    H = hessian(inputs())
    found = factor(H)
    U = found.upper.double()
    damped = H.double() + found.damping * H.diagonal().double().mean() * torch.eye(40)
    assert torch.equal(found.upper, found.upper.triu())
    assert torch.allclose(U.T @ U @ damped, torch.eye(40, dtype=torch.float64), atol=1e-3)
    assert found.damping == 0.005
    assert found.failed == ()
    assert found.dead == 0


def test_squared_pivots_are_those_of_the_factor():
    H = hessian(inputs())
    H[5], H[:, 5] = 0.0, 0.0
    found = squared_pivots(H, ladder=(0.01,))
    expected = factor(H, ladder=(0.01,)).upper.diagonal().square()
    assert torch.allclose(found, expected, rtol=1e-5)
    with pytest.raises(NumericalError, match="not finite"):
        squared_pivots(torch.full((4, 4), float("nan")))


def test_the_hessian_is_left_as_it_was():
    H = hessian(inputs())
    before = H.clone()
    factor(H)
    assert torch.equal(H, before)


def test_a_failed_factorization_climbs_the_ladder_and_is_recorded():
    H = hessian(inputs())
    lowest = torch.linalg.eigvalsh(H.double())[0].float()
    H -= (lowest + 0.02 * H.diagonal().mean()) * torch.eye(40)
    found = factor(H)
    assert found.failed == (0.005, 0.01)
    assert found.damping == 0.05


def test_the_device_inverts_while_it_is_asked(monkeypatch):
    H, events = hessian(inputs()), []
    lowest = torch.linalg.eigvalsh(H.double())[0].float()
    H -= (lowest + 0.02 * H.diagonal().mean()) * torch.eye(40)

    class Asked(factor_module.ReadLater):
        def read(self):
            events.append("asked")
            return super().read()

    def inverted(lower):
        events.append("inverted")
        return lower_inverse(lower)

    lower_inverse = factor_module.lower_inverse
    monkeypatch.setattr(factor_module, "ReadLater", Asked)
    monkeypatch.setattr(factor_module, "lower_inverse", inverted)
    assert factor(H).failed == (0.005, 0.01)
    assert events == ["inverted", "asked"] * 3


def test_past_the_last_damping_the_linear_is_refused_by_name():
    H = hessian(inputs())
    H -= H.diagonal().mean() * torch.eye(40)
    with pytest.raises(NumericalError, match=r"blocks\.3\.up_proj.*not positive definite"):
        factor(H, name="blocks.3.up_proj")


def test_dead_columns_are_counted_and_do_not_break_the_factor():
    x = inputs()
    x[:, [3, 17]] = 0.0
    found = factor(hessian(x))
    assert found.dead == 2
    assert torch.isfinite(found.upper).all()
    assert not found.upper[3, 4:].any()


def test_an_input_without_tokens_factors_to_the_identity():
    found = factor(HessianAccumulator(8, "cpu").mean())
    assert found.dead == 8
    assert torch.equal(found.upper, torch.eye(8))


def test_fewer_tokens_than_columns_still_factor():
    assert torch.isfinite(factor(hessian(inputs(T=12))).upper).all()


def test_activation_order_is_by_energy_and_stable():
    H = torch.diag(torch.tensor([1.0, 5.0, 1.0, 7.0, 5.0]))
    assert activation_order(H.diagonal()).tolist() == [3, 1, 4, 0, 2]
