"""Expected error of the trellis code on Gaussian numbers of any deviation.

Numbers far smaller than a rate fits best cost bits that the path could have used; of larger ones
the tails lie beyond the code's largest value. Measured: benchmarks/results/trellis-sizes.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bitmill_kernels.trellis.code import DEVIATION

STEPS = range(-8, 13)
SIZES = tuple(2 ** (step / 4) for step in STEPS)
"""Deviations over `DEVIATION` that were measured, four an octave."""

ERRORS = (
    (0.09297, 0.02697, 0.007477, 0.002139, 5.531e-4, 1.554e-4, 4.400e-5, 1.167e-5),
    (0.09614, 0.02786, 0.007728, 0.002203, 5.701e-4, 1.601e-4, 4.539e-5, 1.203e-5),
    (0.1009, 0.02899, 0.008022, 0.002287, 5.916e-4, 1.658e-4, 4.685e-5, 1.244e-5),
    (0.1076, 0.0307, 0.008485, 0.002408, 6.178e-4, 1.732e-4, 4.880e-5, 1.293e-5),
    (0.1178, 0.03321, 0.009115, 0.002575, 6.575e-4, 1.829e-4, 5.137e-5, 1.363e-5),
    (0.1335, 0.03695, 0.01006, 0.002824, 7.151e-4, 1.973e-4, 5.502e-5, 1.457e-5),
    (0.1586, 0.0428, 0.01152, 0.003201, 8.030e-4, 2.193e-4, 6.046e-5, 1.601e-5),
    (0.2001, 0.05269, 0.01391, 0.003807, 9.423e-4, 2.542e-4, 6.926e-5, 1.824e-5),
    (0.27, 0.07055, 0.01846, 0.005013, 0.001219, 3.245e-4, 8.681e-5, 2.402e-5),
    (0.3916, 0.1071, 0.02893, 0.008209, 0.002136, 6.440e-4, 2.144e-4, 1.136e-4),
    (0.6032, 0.1853, 0.05714, 0.01935, 0.006622, 0.002859, 0.001395, 0.001083),
    (0.9624, 0.3526, 0.1341, 0.05768, 0.02661, 0.01484, 0.008976, 0.007683),
    (1.556, 0.686, 0.3231, 0.1713, 0.09663, 0.0619, 0.0422, 0.03738),
    (2.509, 1.303, 0.7313, 0.453, 0.2943, 0.2065, 0.1523, 0.1374),
    (4.003, 2.376, 1.524, 1.058, 0.7599, 0.5708, 0.4471, 0.4089),
    (6.297, 4.154, 2.944, 2.219, 1.718, 1.362, 1.118, 1.035),
    (9.764, 6.996, 5.339, 4.279, 3.503, 2.902, 2.471, 2.314),
    (14.94, 11.42, 9.214, 7.733, 6.605, 5.669, 4.971, 4.702),
    (22.6, 18.16, 15.3, 13.3, 11.73, 10.36, 9.298, 8.875),
    (33.85, 28.31, 24.63, 22, 19.9, 17.97, 16.45, 15.82),
    (50.28, 43.4, 38.74, 35.33, 32.57, 29.97, 27.85, 26.96),
)
"""Mean squared errors there over the square of `DEVIATION`, of rates 1 to 8."""


def best_sizes(rates: Sequence[int], device: torch.device) -> Tensor:
    """`DEVIATION` of each rate, f32 [G]."""
    return _tables(tuple(rates), device)[1]


def expected_errors(sizes: Tensor, rates: Sequence[int]) -> Tensor:
    """Mean squared error f32 [..., G] of numbers of deviations `sizes` f32 [..., G].

    rates: those of the last axis. Logarithms are interpolated, and continued beyond the largest;
    below the smallest the error stays what it is there.
    """
    logarithms, deviations, row = _tables(tuple(rates), sizes.device)
    place = ((sizes / deviations).log2() * 4 - STEPS.start).clamp(min=0)
    left = place.floor().clamp(max=len(SIZES) - 2)
    index = left.long() + row
    low, high = logarithms[index], logarithms[index + 1]
    errors: Tensor = (low + (high - low) * (place - left)).exp()
    return errors


@lru_cache(maxsize=256)
def _tables(rates: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ln(error) f32 [8 * 21] of all rates, `DEVIATION` f32 [G], and where rates begin i64 [G]."""
    errors = torch.tensor(ERRORS, device=device).T
    deviations = torch.tensor(list(DEVIATION.values()), device=device)
    own = torch.tensor(rates, device=device) - 1
    logarithms = errors.log() + 2 * deviations.log()[:, None]
    return logarithms.flatten(), deviations[own], own * len(SIZES)
