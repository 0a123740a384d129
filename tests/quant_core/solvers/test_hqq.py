"""Method "hqq": grids that make a norm of the weights' errors small."""

from __future__ import annotations

import re

import pytest
import torch

from bitmill.config.quantization import parse_config
from bitmill.errors import SpecError
from bitmill.quant.codes import LinearCodes, per_column
from bitmill.quant.grid import ClipSettings, Grid, max_code, nearest_codes
from bitmill.runtime.ranks import SINGLE
from bitmill.solvers.hqq.solver import HqqSolver, starting_grids
from bitmill.solvers.rtn import round_to_nearest
from bitmill.solvers.solver import Linear


def layer() -> torch.Tensor:
    """f32 [24, 200]: a full group and a tail, with outliers."""
    generator = torch.Generator().manual_seed(0)
    W = 0.05 * torch.randn(24, 200, generator=generator)
    return torch.where(torch.rand(24, 200, generator=generator) < 0.02, 5 * W, W)


def loss(W: torch.Tensor, codes: LinearCodes, norm: float) -> float:
    return float((W - codes.values()).double().abs().pow(norm).sum())


@pytest.mark.parametrize("norm", [0.7, 2.0, 3.0])
@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_its_norm_is_smaller_than_with_other_grids(width: int, norm: float) -> None:
    W, widths = layer(), (width, width)
    own = loss(W, HqqSolver(norm, 6).quantize(W, widths), norm)
    smallest = round_to_nearest(W, widths, None, ClipSettings.min_max())
    assert own < loss(W, smallest, norm)
    squares = loss(W, round_to_nearest(W, widths, None, ClipSettings()), norm)
    assert own < (1.01 if norm == 2.0 or width == 8 else 0.99) * squares
    assert own < loss(W, HqqSolver(norm, 0).quantize(W, widths), norm)


def test_for_norm_2_scales_are_those_of_least_squares() -> None:
    W = layer()
    found = HqqSolver(2.0, 30).quantize(W, (4, 3))
    steps = found.codes - per_column(found.zeros, 200)
    for group, part in found.groups():
        w, v = W[:, part].double(), steps[:, part].double()
        best = (w * v).sum(1) / (v * v).sum(1)
        assert torch.allclose(found.scales[group].double(), best, rtol=2**-10)


@pytest.mark.parametrize("norm", [1.2, 3.0])
def test_the_iterations_end_where_no_other_scale_has_a_smaller_norm(norm: float) -> None:
    W = layer()[:, :128]
    start = starting_grids(W, 4)
    one = Grid(start.scale[:, :1], start.zero[:, :1])
    found = HqqSolver(norm, 60).fit(W, one, 4)
    steps = nearest_codes(W, found, 4) - found.zero[:, None]

    def norms(factor: float) -> torch.Tensor:
        return (W - factor * found.scale[:, None] * steps).abs().pow(norm).sum(1)

    assert norms(1.0).sum() < min(norms(0.997).sum(), norms(1.003).sum())


@pytest.mark.parametrize("norm", [0.7, 3.0])
def test_weights_on_a_grid_come_back(norm: float) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 8, (6, 128), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 7
    W = (codes - 3.0) * torch.tensor([0.5, 0.25, 1.0, 2.0, 0.125, 4.0])[:, None]
    assert torch.equal(HqqSolver(norm, 6).quantize(W, (3,)).values(), W)


def test_empty_and_constant_rows_and_mixed_widths_are_legal() -> None:
    W = layer()
    W[0], W[1], W[2] = 0.0, 0.3, -1e-9
    weight, result = (
        HqqSolver(3.0, 6).solve([Linear("one", W, (2, 5))], None, SINGLE).read(SINGLE)[0]
    )
    found = weight.dequantize()
    assert torch.equal(found[0], W[0])
    assert torch.allclose(found[1], W[1], rtol=1e-3)
    for part, width in ((slice(0, 128), 2), (slice(128, 200), 5)):
        assert int(weight.codes[:, part].max()) <= max_code(width)
    error = (W - found).square().sum() / W.square().sum()
    assert result.relative_error == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("allocation", [{"method": "uniform"}, {"method": "sba"}, {}])
def test_every_allocation_takes_it_and_nothing_is_collected(allocation: dict[str, str]) -> None:
    asked = {"budget": {"bits": 3.2}, "allocation": allocation, "refinement": {"method": "hqq"}}
    assert parse_config(asked).method.needs == frozenset()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"code": "trellis"}, "method 'hqq' finds no codes of 'trellis'"),
        ({"refinement": {"method": "hqq", "settings": {"norm": 0}}}, "settings.norm"),
        (
            {"refinement": {"method": "hqq", "transforms": [{"name": "awq"}]}},
            "transform 'awq' with method 'hqq', which looks at no inputs",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, object], problem: str) -> None:
    asked = {"budget": {"bits": 3.2}, "refinement": {"method": "hqq"}} | changes
    with pytest.raises(SpecError, match=re.escape(problem)):
        parse_config(asked)
