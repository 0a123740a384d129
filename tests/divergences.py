"""Logits and changes that divergences are tested on; fp64 has the last word."""

import torch

CASES = ("small", "large", "outlier")


def case(kind, T, N):
    """Logits y and changes d f32 [T, N]: small changes; overturned rows; one channel over all."""
    generator = torch.Generator().manual_seed(N)
    y = 3 * torch.randn(T, N, generator=generator)
    d = torch.randn(T, N, generator=generator)
    if kind == "small":
        return y, 0.003 * d
    if kind == "large":
        return y, 200 * d
    y[:, N // 2] = 1500.0
    d[:, N // 2] = -120.0
    return y, d


def exact(y, d):
    """KL(softmax(y) || softmax(y + d)) f64 [T], by the definition."""
    source, moved = torch.log_softmax(y.double(), 1), torch.log_softmax(y.double() + d.double(), 1)
    return (source.exp() * (source - moved)).sum(1)
