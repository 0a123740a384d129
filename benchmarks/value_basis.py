"""Another basis for the values of attention: the same function, easier to quantize.

Attention takes the same weighted sum of all channels of a value head, so any invertible M [d, d]
may stand between v_proj's rows of a head and o_proj's columns of the heads that read it:

    v' = M v,   o' = o M^-1

With C = v v^T and G = mean g g^T (g: loss gradient at v_proj's output, in the old basis), the
expected loss of rounding v' is about sum_n (M^-T G M^-1)_nn (M C M^T)_nn: the row's sensitivity
times the square of its range. C = L L^T and L^T G L = V diag(l) V^T give M = R diag(l^e) V^T L^-1,
which with e = 1/4 makes both factors R diag(l^1/2) R^T; R, a Hadamard matrix, spreads them evenly
over the rows, which is the least their product can sum to. A smaller e leaves more of the order of
o_proj's columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitmill.calibration.gradients import GradientPass, PassSettings
from bitmill.models.streamed import StreamedModel, set_weight, weight_of

EXPONENT = 0.15
RIDGE = 1e-3


def value_bases(model: StreamedModel, tokens: Tensor, settings: PassSettings) -> list[Tensor]:
    """M f64 [heads, d, d] of every block, measured on windows of tokens int64 [S, T]."""
    observers: dict[int, _ValueGradients] = {}

    def observer(i: int) -> _ValueGradients:
        observers[i] = _ValueGradients()
        return observers[i]

    GradientPass(model, tokens, settings).run(observer)
    bases = []
    for i in range(model.block_count):
        value, _ = _value_output(model, i, model.load_block(i))
        W = weight_of(value).double()
        bases.append(_bases(W, observers[i].squares, head_size(model)))
    return bases


def change_basis(model: StreamedModel, i: int, block: nn.Module, bases: Tensor) -> None:
    """Move block i's v_proj and o_proj into other bases f64 [heads, d, d]."""
    value, output = _value_output(model, i, block)
    if value.bias is not None:
        raise ValueError("v_proj has a bias, which would have to change too")
    heads, d, _ = bases.shape
    W = weight_of(value).double().view(heads, d, -1)
    set_weight(value, (bases @ W).flatten(0, 1))
    columns = weight_of(output).double()
    readers = columns.shape[1] // (heads * d)
    inverse = torch.linalg.inv(bases).repeat_interleave(readers, 0)
    parts = columns.view(len(columns), heads * readers, d).transpose(0, 1) @ inverse
    set_weight(output, parts.transpose(0, 1).flatten(1))


def head_size(model: StreamedModel) -> int:
    """Channels of a head."""
    config = model.config
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def hadamard(size: int) -> Tensor:
    """Orthogonal f64 [size, size] of entries of one magnitude; size is a power of 2."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scaled: Tensor = matrix / size**0.5
    return scaled


class _ValueGradients:
    """Sum of g g^T at v_proj's output; a `BlockObserver`."""

    squares: Tensor

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if name.endswith("v_proj"):
            added = (gradient.float().T @ gradient.float()).double()
            self.squares = self.squares + added if hasattr(self, "squares") else added


def _value_output(model: StreamedModel, i: int, block: nn.Module) -> tuple[nn.Module, nn.Module]:
    modules = {n.rpartition(".")[2]: m for n, m in model.linears(block, i).items()}
    return modules["v_proj"], modules["o_proj"]


def _bases(W: Tensor, squares: Tensor, d: int) -> Tensor:
    found = []
    for start in range(0, len(W), d):
        rows = slice(start, start + d)
        G = squares[rows, rows]
        G = G + RIDGE * G.diagonal().mean() * torch.eye(d, dtype=G.dtype, device=G.device)
        lower = torch.linalg.cholesky(W[rows] @ W[rows].T)
        values, V = torch.linalg.eigh(lower.T @ G @ lower)
        scaled = values.clamp(min=0).pow(EXPONENT)[:, None] * V.T
        M = torch.linalg.solve_triangular(lower, scaled, upper=False, left=False)
        found.append(hadamard(d).to(M) @ M)
    return torch.stack(found)
