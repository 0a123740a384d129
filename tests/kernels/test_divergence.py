import pytest
import torch

from bitmill_kernels.divergence.divergence import divergence
from divergences import CASES, case, exact


@pytest.mark.parametrize("N", [1, 300, 5000])
@pytest.mark.parametrize("kind", CASES)
def test_divergences_are_those_of_the_definition(N, kind):
    y, d = case(kind, 20, N)
    found = divergence(torch.log_softmax(y, 1), d, backend="reference")
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact(y, d), rtol=1e-4, atol=1e-6)


def test_a_small_divergence_is_not_lost_in_large_logits():
    y, d = case("small", 400, 4096)
    found = divergence(torch.log_softmax(y + 1000, 1), d, backend="reference")
    expected = exact(y, d)
    assert expected.mean() < 1e-5
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.02)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="give both as"):
        divergence(torch.zeros(2, 3), torch.zeros(3, 2))
