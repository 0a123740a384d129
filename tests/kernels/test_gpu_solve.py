"""Search, column loop and polish on a CUDA device against plain torch on the CPU."""

import numpy as np
import pytest
import torch

from bitmill.quant.codes import output_error
from bitmill.runtime.graphs import graphs_kept
from bitmill.sensitivity.fisher import SensitivitySettings, linear_costs
from bitmill.solvers.factor import Factor, factor
from bitmill.solvers.gptq.column_loop import solve, solve_siblings
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.grid_search import CompensatedSettings
from bitmill.solvers.polish import polish_codes
from bitmill.solvers.rtn import round_to_nearest
from bitmill_kernels.linalg.split_product import (
    left_parts,
    right_parts,
    split_product,
    subtract_parts,
)
from bitmill_kernels.linalg.substitution import cholesky_solver, lower_inverse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_cuda(curvature):
    factor = curvature.factor
    moved = Factor(factor.upper.cuda(), factor.damping, factor.dead, factor.failed)
    return Curvature(curvature.H.cuda(), moved)


def linear(N, K):
    generator = torch.Generator().manual_seed(N + K)
    x = torch.randn(2 * K, K, generator=generator) @ torch.randn(K, K, generator=generator)
    W = torch.randn(N, K, generator=generator)
    W[2] = 0.0
    return W, Curvature.prepare(x.T @ x / len(x))


def polished(matrices, codes, H):
    return polish_codes(matrices, matrices, codes, H, sweeps=GptqSettings().rounds)[0]


def test_replayed_column_loops_give_the_same_bytes():
    settings, cases = GptqSettings(), []
    for seed, widths in enumerate(((3, 2, 4, 8, 2, 3), (2, 2, 3, 3, 4, 2), (3, 1, 4, 8, 2, 3)) * 2):
        torch.manual_seed(seed)
        x = torch.randn(1400, 700) @ torch.randn(700, 700)
        cases.append((torch.randn(75, 700).cuda(), Curvature.prepare((x.T @ x).cuda()), widths))
    launched = [solve(*case, settings) for case in cases]
    with graphs_kept(torch.device("cuda")):
        found = [solve(*case, settings) for case in cases]
    for one, two in zip(launched, found, strict=True):
        for name in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("compensated", [None, CompensatedSettings()], ids=["clip", "search"])
@pytest.mark.parametrize(("N", "K"), [(75, 700), (40, 256), (33, 643), (64, 576)])
def test_solving_and_polishing_reach_the_plain_error(N, K, compensated):
    W, curvature = linear(N, K)
    widths = (3, 2, 4, 8, 2, 1)[: -(-K // 128)]
    settings = GptqSettings(compensated=compensated)
    plain = solve(W, curvature, widths, settings)
    cuda = on_cuda(curvature)
    fast = solve(W.cuda(), cuda, widths, settings)
    again = solve(W.cuda(), cuda, widths, settings)
    assert torch.equal(fast.codes, again.codes)
    for one, two in (
        (plain, fast),
        (*polished([W], [plain], curvature.H), *polished([W.cuda()], [fast], cuda.H)),
    ):
        errors = [output_error(W - c.values().cpu(), curvature.H) for c in (one, two)]
        assert errors[1] == pytest.approx(errors[0], rel=0.01)
        assert (one.codes == two.codes.cpu()).float().mean() >= 0.9
        assert output_error(W.cuda() - two.values(), cuda.H) == pytest.approx(errors[1], rel=1e-3)


def test_rounding_and_costs_are_the_plain_ones():
    W, curvature = linear(300, 700)
    diagonal = curvature.H.diagonal()
    clip = GptqSettings().clip
    plain = round_to_nearest(W, (2, 1, 6, 3, 4, 5), diagonal, clip)
    fast = round_to_nearest(W.cuda(), (2, 1, 6, 3, 4, 5), diagonal.cuda(), clip)
    assert (plain.codes == fast.codes.cpu()).float().mean() >= 0.99
    settings = SensitivitySettings(widths=(1, 2, 3, 4, 8), rows=200)
    weight = torch.rand(300, dtype=torch.float64)
    expected = linear_costs(W, weight, curvature, settings)
    found = linear_costs(W.cuda(), weight, on_cuda(curvature), settings)
    assert np.allclose(expected, found, rtol=0.01)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("M", "K", "N"), [(256, 1000, 128), (3, 129, 77), (1, 1, 1)])
def test_split_products_are_near_those_of_fp64(M, K, N, flip):
    left, right = torch.randn(M, K), 1e20 * torch.randn(N, K).T
    if flip:
        left, right = left.T.contiguous().T, right.contiguous()
    exact = left.double() @ right.double()
    found = split_product(left.cuda(), right.cuda())
    assert found.dtype == torch.float32
    assert float((found.cpu().double() - exact).norm()) < 2e-5 * float(exact.norm())


def test_products_are_taken_off_a_slab_in_place():
    total, left, right = (torch.randn(*shape) for shape in ((300, 96), (40, 200), (200, 96)))
    expected = total.double()
    expected[100:140] -= left.double() @ right.double()
    found = total.cuda()
    subtract_parts(found[100:140], left_parts(left.cuda()), right_parts(right.cuda()))
    assert float((found.cpu().double() - expected).norm()) < 1e-5 * float(expected.norm())


def test_blocks_solve_what_the_whole_does():
    x = torch.randn(5000, 2500)
    lower = torch.linalg.cholesky(x.T @ x / len(x) + 0.1 * torch.eye(2500))
    right = torch.randn(130, 2500).T
    exact = torch.cholesky_solve(right.double(), lower.double())
    found = cholesky_solver(lower.cuda())(right.cuda()).cpu().double()
    assert float((found - exact).norm()) < 1e-4 * float(exact.norm())
    inverse = torch.linalg.inv(lower.double())
    found = lower_inverse(lower.cuda()).cpu().double()
    assert float((found - inverse).norm()) < 1e-4 * float(inverse.norm())


def test_siblings_are_solved_as_each_alone():
    W, curvature = linear(160, 700)
    cuda, settings = on_cuda(curvature), GptqSettings()
    widths = [(3, 2, 4, 8, 2, 1), (1, 2, 3, 4, 5, 6)]
    matrices = [W[:64].cuda(), W[64:].cuda()]
    together = solve_siblings(matrices, cuda, widths, settings)
    after = polished(matrices, together, cuda.H)
    for i, matrix in enumerate(matrices):
        alone = solve(matrix, cuda, widths[i], settings)
        [own] = polished([matrix], [alone], cuda.H)
        for one, two in ((alone, together[i]), (own, after[i])):
            assert (one.codes == two.codes).float().mean() >= 0.95
            errors = [output_error(matrix - c.values(), cuda.H) for c in (one, two)]
            assert errors[1] == pytest.approx(errors[0], rel=0.005)


def test_errors_around_polishing_are_those_of_the_codes():
    W, curvature = linear(160, 700)
    cuda, settings = on_cuda(curvature), GptqSettings(compensated=None)
    widths = [(3, 2, 4, 8, 2, 1), (1, 2, 3, 4, 5, 6)]
    matrices = [W[:64].cuda(), W[64:].cuda()]
    sources = [matrices[0], matrices[1] + 0.1 * torch.randn(96, 700).cuda()]
    codes = solve_siblings(matrices, cuda, widths, settings)
    after, errors = polish_codes(matrices, sources, codes, cuda.H, sweeps=4)
    for when, found in zip((codes, after), errors.tolist(), strict=True):
        for source, own, error in zip(sources, when, found, strict=True):
            assert error == pytest.approx(output_error(source - own.values(), cuda.H), rel=2e-3)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_stacked_right_hand_sides_are_solved_as_each_alone(ridge):
    W, curvature = linear(160, 1300)
    cuda = on_cuda(curvature)
    matrices = [W[:1].cuda(), W[1:64].cuda(), W[64:].cuda()]
    for matrix, found in zip(matrices, cuda.solve_each(matrices, ridge), strict=True):
        expected = curvature.solve(matrix.cpu(), ridge)
        assert found.shape == matrix.shape
        assert float((found.cpu() - expected).norm()) < 1e-3 * float(expected.norm())


def test_a_factor_that_failed_is_made_again_with_more_damping():
    H = linear(4, 1300)[1].H.double()
    H -= (torch.linalg.eigvalsh(H)[0] + 0.02 * H.diagonal().mean()) * torch.eye(1300)
    H = H.float().cuda()
    found = factor(H)
    assert found.failed == (0.005, 0.01)
    damped = H.double() + found.damping * H.diagonal().double().mean() * torch.eye(1300).cuda()
    U = found.upper.double()
    assert float((U @ damped @ U.T - torch.eye(1300).cuda()).abs().max()) < 1e-2
