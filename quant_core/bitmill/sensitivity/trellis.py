"""What each rate of a trellis code costs each group, from energies and the code's distortion.

Rotated weights are nearly Gaussian, whatever they were, so a rate leaves D(rate) of their variance
as error, in every direction alike. GPTQ's feedback carries errors on to later columns, whose
variance grows by them. With U the factor of the rotated H, b the columns of a tile and n a row,

    cost[g, rate] = 1/2 D(rate) sum_n q_n sum_b v[n, b] |U_bb^-1|^2                    b of group g
    v[n, b] = mean_k w'[n, k]^2 + D(rate) sum_c v[n, c] mean_k |U_cc^-1 U_ck|^2   k of b, c before b

where errors carried on are those of the rate everywhere, and q_n is what the search leaves of it:
rows of a tile share its bits by what they count, so an error of theirs is 1 / s_n^2 of D, s_n their
emphasis (`bitmill_kernels/trellis/group.py`). Here s_n follows from q of squared gradients, in the
search from that of their sizes (`calibration/loss_weights.py`). No group is quantized. `q`, H and
what is given up: `sensitivity/fisher.py`. On correlated Gaussian layers, in the metric of H and its
damping, the sum over groups is within 6 % of that of encodings at rates 2 to 5, and 7 to 13 % above
at rate 1, where it would be 0.6 without the errors carried on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bitmill.allocation.profile import FloatArray
from bitmill.quant.codes import group_slices
from bitmill.quant.rewrites import Rewrites
from bitmill.solvers.trellis import tile_inverses, tile_losses, whole_tiles
from bitmill_kernels.trellis.code import DISTORTION
from bitmill_kernels.trellis.group import emphases
from bitmill_kernels.trellis.layout import TILE


def trellis_costs(
    W: Tensor, row_weight: Tensor, upper: Tensor, rates: Sequence[int], rewrites: Rewrites
) -> FloatArray:
    """Costs float64 [G, B], nats per token, of every rate for every group.

    W: [N, K] in the source's columns. row_weight: q f64 [N]. upper: U f32 [K, K] in packed, rotated
    columns.
    """
    power = rewrites.weights(W.float()).square()
    counts = whole_tiles(row_weight.to(power) * power.mean(1))
    errors = row_weight.to(power) / emphases(counts)[: len(power)].square()
    weighed = _by_tile(errors @ power, len(upper)).double()
    loss, carried = carried_on(upper)
    tiles = [
        slice(part.start // TILE, -(-part.stop // TILE)) for _, part in group_slices(len(upper))
    ]
    columns = []
    for rate in rates:
        D = DISTORTION[rate]
        chain = torch.eye(len(weighed), device=weighed.device).double() - D * carried.T
        variance = torch.linalg.solve_triangular(chain, weighed[:, None], upper=False)[:, 0]
        left = 0.5 * D * variance * loss
        columns.append(torch.stack([left[part].sum() for part in tiles]))
    found: FloatArray = torch.stack(columns, 1).cpu().numpy()
    return found


def carried_on(upper: Tensor) -> tuple[Tensor, Tensor]:
    """|U_bb^-1|^2 of every tile's columns b, f64 [T], and the mean over columns k of b of
    |U_cc^-1 U_ck|^2 for all tiles c before b, f64 [T, T]."""
    K = len(upper)
    inverses = tile_inverses(upper)
    loss, inverse = tile_losses(inverses, K).double(), torch.cat(inverses)
    rows = functional.pad(upper, (0, -K % TILE, 0, -K % TILE)).view(len(inverse), TILE, -1)
    reach = (inverse @ rows).square().sum(1)
    return loss, _by_tile(reach, K).double().triu(1)


def _by_tile(values: Tensor, K: int) -> Tensor:
    """Means [..., T] over the columns of each tile, of values [..., K] or filled up."""
    sums = functional.pad(values[..., :K], (0, -K % TILE)).unflatten(-1, (-1, TILE)).sum(-1)
    counts = torch.full((sums.shape[-1],), TILE, device=values.device)
    counts[-1] = (K - 1) % TILE + 1
    means: Tensor = sums / counts
    return means
