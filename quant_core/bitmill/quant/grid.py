"""Affine grids: one scale and one zero point per output row and group of columns.

    w ~ s (q - z)      q in 0..2^b - 1, s >= 0 exact in fp16
                       z integer in 0..2^b - 1; at width 1: z in {0, 1/8, ..., 15/8}

A grid is chosen to make sum_j h_j (w_j - s (q_j - z))^2 small, where h_j weighs column j
(usually the diagonal of the Hessian). `clip_search` tries, in this order, and keeps the best:

1. ranges shrunk on both sides, p (max - min) for p from 1 down to 0.3 (GPTQ's own grid is p = 1);
2. lower and upper end apart: other zero points, with scales around the best one;
3. alternating least squares: s = sum h w v / sum h v^2 with v = q - z, new codes, again.

Width 0 has the one level 0: scale 0, zero 0, codes 0, so that all of the weight is error.

Width 1 has two levels that need not include 0. They start from the exact weighted two-means split
of the row, found by sorting, then every storable zero point gets its own least squares.

Scales are rounded through fp16 before any error is measured, so the error measured is the error
stored. A range whose scale rounds to 0 gets scale 0, zero 0 and codes 0; a scale beyond fp16 is an
error. Given up: the exact optimum over (s, z, q), which costs a sort per row for every width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bitmill.errors import NumericalError
from bitmill_kernels.backend import resolve_backend
from bitmill_kernels.layout import GROUP_SIZE

ONE_BIT_ZERO_STEPS = 8
"""Stored zero points of width 1 count eighths of a step."""

FP16_MAX = 65504.0


class Grid(NamedTuple):
    """Scale f32 [N], exact in fp16, and zero f32 [N], in codes (eighths at width 1)."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class ClipSettings:
    """How `clip_search` looks for a grid; `ClipSettings.min_max()` turns the search off."""

    smallest_shrink: float = 0.3
    shrinks: int = 36
    zero_offsets: tuple[int, ...] = (-2, -1, 1, 2)
    zero_scales: tuple[float, ...] = (0.8, 0.87, 0.94, 1.0, 1.06, 1.13, 1.2)
    least_squares: int = 4

    @classmethod
    def min_max(cls) -> ClipSettings:
        """The plain min-max grid of GPTQ: no shrinking, no refinement."""
        return cls(shrinks=1, zero_offsets=(), least_squares=0)


def max_code(width: int) -> int:
    """Largest code of a width: 2^b - 1."""
    return (1 << width) - 1


def stored_zeros(zeros: Tensor, widths: Sequence[int]) -> Tensor:
    """Zero points [G, N] as the format stores them: u8, in eighths at width 1."""
    steps = torch.tensor([float(ONE_BIT_ZERO_STEPS) if width == 1 else 1.0 for width in widths])
    steps = steps.to(zeros.device, non_blocking=True)
    return (zeros * steps[:, None]).round().to(torch.uint8)


def round_scale(scale: Tensor) -> Tensor:
    """The nearest fp16 value of each scale, as f32.

    Raises NumericalError where a scale does not fit fp16.
    """
    rounded = scale.to(torch.float16).to(torch.float32)
    if not bool(torch.isfinite(rounded).all()):
        raise NumericalError(
            f"a scale of {float(scale.abs().max()):.4g} does not fit fp16 (largest {FP16_MAX:g}); "
            "the weights are too large to quantize: check the source checkpoint",
            code="scale_overflow",
        )
    return rounded


def nearest_codes(W: Tensor, grid: Grid, width: int) -> Tensor:
    """Codes of W [N, C] on its grid, f32 [N, C] holding integers 0..2^b - 1."""
    return _codes(W, grid.scale[:, None], grid.zero[:, None], width)


def values(codes: Tensor, grid: Grid) -> Tensor:
    """Real values s (q - z) of codes [N, C], f32."""
    return grid.scale[:, None] * (codes.float() - grid.zero[:, None])


def clip_search(
    W: Tensor,
    width: int,
    weight: Tensor | None = None,
    *,
    settings: ClipSettings | None = None,
) -> Grid:
    """The grid of every row of W f32 [N, C] that makes the weighted squared error small.

    `weight` f32 [C] >= 0 weighs the columns; None, or all zero, weighs them alike. Never worse
    than the min-max grid under that weight. Raises NumericalError on fp16 overflow.
    """
    settings = settings or ClipSettings()
    if width == 0:
        return Grid(*W.new_zeros(2, len(W)))
    if width > 1 and resolve_backend("auto", W.device) == "triton":
        tops = torch.full((1, 1), float(max_code(width)), device=W.device).expand(1, len(W))
        h = column_weight(W, weight)
        found = clip_search_groups(W.T, tops, h, settings)
        return Grid(round_scale(found.scale[0]), found.zero[0])
    h = column_weight(W, weight)
    if width == 1 and settings.least_squares:
        return _two_level_search(W, h, settings.least_squares)
    lo, hi = W.amin(1).clamp(max=0.0), W.amax(1).clamp(min=0.0)
    grid = _best(W, _shrunk_candidates(lo, hi, width, settings), width, h)
    if settings.zero_offsets and width > 1:
        grid = _best(W, _moved_candidates(grid, width, settings), width, h)
    for _ in range(settings.least_squares):
        grid = _best(W, _least_squares_candidates(W, grid, width, h), width, h)
    return grid


def clip_search_groups(
    W: Tensor, largest: Tensor, weight: Tensor, settings: ClipSettings, out: Grid | None = None
) -> Grid:
    """Grids f32 [G, N] of all groups of W f32 [K, N] (columns first) at once, by Triton.

    largest: f32 [G, N] largest codes, 0 or at least 3; weight: f32 [K], as `relative_weights`
    gives it. A range beyond fp16 gets an infinite scale: pass the scales through `round_scale`.
    out: where to write the grids, contiguous.
    """
    from bitmill_kernels.gptq.clip_search_triton import clip_search_triton

    shrinks, moves = _search_plan(settings, W.device)
    fits = settings.least_squares
    return Grid(*clip_search_triton(W, weight, largest, shrinks, moves, fits, out))


@cache
def _search_plan(
    settings: ClipSettings, device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Shares of the range, and (scale factor, zero offset) of the moves after it, on a device."""
    shrinks = torch.linspace(1.0, settings.smallest_shrink, settings.shrinks, device=device)
    moves = [(scale, off) for off in settings.zero_offsets for scale in settings.zero_scales]
    if not moves:
        return shrinks, None
    factors, offsets = torch.tensor(moves, dtype=torch.float32).T.contiguous().to(device)
    return shrinks, (factors, offsets)


def one_bit_groups(W: Tensor, weight: Tensor, settings: ClipSettings) -> Grid:
    """Grids f32 [G, N] of width 1 of all groups of W f32 [N, K] at once.

    weight: f32 [K]. A tail is filled up with columns of weight 0, which no sum notices.
    """
    N, K = W.shape
    groups = -(-K // GROUP_SIZE)
    padding = groups * GROUP_SIZE - K
    rows = functional.pad(W, (0, padding)).view(N * groups, GROUP_SIZE)
    h = functional.pad(weight, (0, padding)).view(groups, GROUP_SIZE).repeat(N, 1)
    if not settings.least_squares:
        grid = clip_search(rows, 1, None, settings=settings)
    else:
        grid = _two_level_search(rows, h, settings.least_squares)
    return Grid(*(value.view(N, groups).T.contiguous() for value in grid))


def relative_weights(weight: Tensor) -> Tensor:
    """Column weights f32 [K], each group's divided by their mean; ones where all are zero."""
    full = len(weight) - len(weight) % GROUP_SIZE
    groups = weight[:full].view(-1, GROUP_SIZE)
    mean = groups.mean(1, keepdim=True)
    whole = torch.where(mean > 0, groups / mean, torch.ones_like(groups)).flatten()
    tail = weight[full:]
    return torch.cat([whole, column_weight(tail[None], tail)]) if len(tail) else whole


def column_weight(W: Tensor, weight: Tensor | None) -> Tensor:
    """The weight f32 [C] divided by its mean; ones where None or all zero."""
    if weight is None:
        return W.new_ones(W.shape[1])
    mean = weight.mean()
    return torch.where(mean > 0, weight / mean, torch.ones_like(weight))


def pick(candidates: Grid, errors: Tensor) -> Grid:
    """The candidate [N] of least error from candidates [N, P] with errors [N, P]."""
    best = errors.argmin(1, keepdim=True)
    return Grid(candidates.scale.gather(1, best)[:, 0], candidates.zero.gather(1, best)[:, 0])


def weighted_errors(W: Tensor, candidates: Grid, width: int, h: Tensor) -> Tensor:
    """sum_j h_j (w_j - ŵ_j)^2 for every row and candidate, f32 [N, P], in bounded memory."""
    rows = max(1, chunk_elements(W.device) // (candidates.scale.shape[1] * W.shape[1]))
    parts = []
    for start in range(0, W.shape[0], rows):
        part = slice(start, start + rows)
        w = W[part, None, :]
        scale, zero = candidates.scale[part, :, None], candidates.zero[part, :, None]
        error = w - scale * (_codes(w, scale, zero, width) - zero)
        parts.append(error.square() @ h)
    return torch.cat(parts)


def chunk_elements(device: torch.device) -> int:
    """Elements of one temporary: small enough for a CPU's cache, large enough for a GPU."""
    return 1 << 25 if device.type == "cuda" else 1 << 18


def legal_candidates(scale: Tensor, zero: Tensor, width: int) -> Grid:
    """Scales rounded through fp16, zero points made storable; a zero scale takes zero 0."""
    scale = round_scale(scale)
    steps = ONE_BIT_ZERO_STEPS if width == 1 else 1
    top = 15 if width == 1 else max_code(width)
    zero = (zero * steps).round().clamp(0, top) / steps
    return Grid(scale, torch.where(scale > 0, zero, torch.zeros_like(zero)))


def _codes(w: Tensor, scale: Tensor, zero: Tensor, width: int) -> Tensor:
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return (w * inverse + zero).round().clamp_(0, max_code(width))


def _best(W: Tensor, candidates: Grid, width: int, h: Tensor) -> Grid:
    return pick(candidates, weighted_errors(W, candidates, width, h))


def _shrunk_candidates(lo: Tensor, hi: Tensor, width: int, settings: ClipSettings) -> Grid:
    """Ranges p [lo, hi]; the zero point does not depend on p."""
    p = torch.linspace(1.0, settings.smallest_shrink, settings.shrinks, device=lo.device)
    step = (hi - lo) / max_code(width)
    zero = torch.where(step > 0, -lo / step, torch.zeros_like(step))
    return legal_candidates(step[:, None] * p, zero[:, None].expand(-1, len(p)), width)


def _moved_candidates(grid: Grid, width: int, settings: ClipSettings) -> Grid:
    """The grid itself first, then every other zero point with scales around its own."""
    scales = torch.tensor(settings.zero_scales, device=grid.scale.device)
    offsets = torch.tensor(settings.zero_offsets, device=grid.scale.device, dtype=torch.float32)
    scale = (grid.scale[:, None, None] * scales).expand(-1, len(offsets), -1).flatten(1)
    zero = (grid.zero[:, None, None] + offsets[:, None]).expand(-1, -1, len(scales)).flatten(1)
    return legal_candidates(
        torch.cat([grid.scale[:, None], scale.clamp(max=FP16_MAX)], 1),
        torch.cat([grid.zero[:, None], zero], 1),
        width,
    )


def _least_squares_candidates(W: Tensor, grid: Grid, width: int, h: Tensor) -> Grid:
    """The grid itself and the one whose scale is the least-squares fit to its codes."""
    v = nearest_codes(W, grid, width) - grid.zero[:, None]
    fitted = _fitted_scale((W * v) @ h, v.square() @ h, grid.scale)
    return legal_candidates(
        torch.stack([grid.scale, fitted], 1), grid.zero[:, None].expand(-1, 2), width
    )


def _fitted_scale(product: Tensor, square: Tensor, fallback: Tensor) -> Tensor:
    """product / square where that is a legal scale, else the fallback."""
    fitted = product / square
    legal = (square > 0) & (fitted > 0) & (fitted <= FP16_MAX)
    return torch.where(legal, fitted, fallback)


def _two_level_search(W: Tensor, h: Tensor, iterations: int) -> Grid:
    """The best of every zero point of width 1 with its least-squares scale, from two starts.

    h: f32 [C], or [N, C] row by row. Code 1 goes to the columns above a threshold, so all sums are
    differences of cumulated ones over the sorted row.
    """
    ordered, index = W.contiguous().sort(1)
    weight = h[index] if h.dim() == 1 else h.gather(1, index)
    mass, moment = _split_sums(weight), _split_sums(weight * ordered)
    low, high = _two_means(ordered, mass, moment)
    zero = torch.arange(16, device=W.device, dtype=torch.float32) / ONE_BIT_ZERO_STEPS
    zero = zero.repeat(len(W), 2)
    gap, reach = high - low, torch.maximum(high.abs(), low.abs())
    scale = torch.cat([gap[:, None].expand(-1, 16), reach[:, None].expand(-1, 16)], 1)
    for _ in range(iterations):
        scale = _fitted_scale(*_two_level_sums(ordered, mass, moment, scale, zero), scale)
    found = legal_candidates(scale, zero, 1)
    product, square = _two_level_sums(ordered, mass, moment, *found)
    return pick(found, found.scale * (found.scale * square - 2 * product))


def _split_sums(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the first and of the other columns of [N, C] for every split, each [N, C + 1].

    Each is summed up by itself: a difference of the whole and one part is nothing but rounding
    where the other part weighs little.
    """
    first = functional.pad(values.cumsum(1), (1, 0))
    return first, functional.pad(values.flip(1).cumsum(1).flip(1), (0, 1))


def _two_level_sums(
    ordered: Tensor,
    mass: tuple[Tensor, Tensor],
    moment: tuple[Tensor, Tensor],
    scale: Tensor,
    zero: Tensor,
) -> tuple[Tensor, Tensor]:
    """sum_j h_j w_j v_j and sum_j h_j v_j^2 with v = q - z, for every candidate f32 [N, P].

    ordered: rows in ascending order f32 [N, C]; mass, moment: h and h w of them summed up.
    """
    never = torch.where(zero > 0.5, -torch.inf, torch.inf)
    threshold = torch.where(scale > 0, (0.5 - zero) * scale, never)
    below = torch.searchsorted(ordered, threshold, right=True)
    lower, upper = -zero, 1 - zero
    low_moment, high_moment = (part.gather(1, below) for part in moment)
    low_mass, high_mass = (part.gather(1, below) for part in mass)
    product = lower * low_moment + upper * high_moment
    return product, lower.square() * low_mass + upper.square() * high_mass


def _two_means(
    ordered: Tensor, mass: tuple[Tensor, Tensor], moment: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The weighted means below and above the split of least squared error, each f32 [N]."""
    if ordered.shape[1] == 1:
        return ordered[:, 0].clamp(max=0.0), ordered[:, 0].clamp(min=0.0)
    left_mass, right_mass = (part[:, 1:-1] for part in mass)
    left, right = (part[:, 1:-1] for part in moment)
    tiny = torch.finfo(torch.float32).tiny
    explained = left.square() / left_mass.clamp(min=tiny)
    explained = explained + right.square() / right_mass.clamp(min=tiny)
    best = explained.argmax(1, keepdim=True)
    low = (left / left_mass.clamp(min=tiny)).gather(1, best)[:, 0]
    high = (right / right_mass.clamp(min=tiny)).gather(1, best)[:, 0]
    return low, torch.maximum(high, low)
