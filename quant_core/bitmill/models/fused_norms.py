"""RMS norms of a block as one kernel each, where weights are half precision.

transformers computes x / rms(x) in fp32, rounds it and multiplies by the weight: seven kernels that
take as long as the matrix products between two norms. `rms_norm` of torch does it in one, and
rounds once instead of twice, so its result is nearer the exact one by a part of the last bit.

Norms are found by what they compute: a module with a `variance_epsilon`, as transformers names it,
whose only parameter is a vector and that agrees with `rms_norm` on random inputs. Others (weights
that stand for 1 + w, norms with a bias) stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

TOLERANCE = 0.01
PROBES = 4


@torch.no_grad()
def fuse_norms(block: nn.Module) -> list[str]:
    """Replaces the forward pass of every RMS norm of the block; returns their paths."""
    fused = []
    for path, module in block.named_modules():
        epsilon = getattr(module, "variance_epsilon", None)
        if type(epsilon) is float and _is_rms_norm(module, epsilon):
            module.forward = _Forward(module, epsilon)
            fused.append(path)
    return fused


class _Forward:
    """`rms_norm` with the module's weight of the moment."""

    def __init__(self, module: Any, epsilon: float) -> None:
        self._module, self._epsilon = module, epsilon

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = self._module.weight
        return functional.rms_norm(hidden_states, weight.shape, weight, self._epsilon)


def _is_rms_norm(module: Any, epsilon: float) -> bool:
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.dim() != 1:
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (PROBES, len(weight))
    x = torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)
    expected = module(x).float()
    missed = (functional.rms_norm(x, weight.shape, weight, epsilon).float() - expected).norm()
    return bool(missed <= TOLERANCE * expected.norm())
