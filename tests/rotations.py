"""Queries, keys and angles that rotations are tested on; fp64 has the last word."""

import torch


def tensors(
    *, B=2, heads=(5, 3), T=7, d=16, turned=None, dtype=torch.float32, layout="tokens", shared=True
):
    """q [B, H, T, d], k [B, Hk, T, d] and cos, sin [1 or B, T, turned].

    layout: `tokens`, heads side by side in a token's row as projections give them; `heads`,
    contiguous; `sliced`, in the middle of wider rows that start at no round address.
    """
    generator = torch.Generator().manual_seed(T + d)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def of(count):
        if layout == "heads":
            return draw(B, count, T, d)
        if layout == "tokens":
            return draw(B, T, count * d).view(B, T, count, d).transpose(1, 2)
        return draw(B, T, count, 2 * d + 3).transpose(1, 2)[..., 3 : 3 + d]

    angles = (1 if shared else B, T, turned or d)
    return *(of(count) for count in heads), draw(*angles), draw(*angles)


LAYOUTS = ("tokens", "heads", "sliced")


def definition(x, cos, sin):
    """f64: columns j and j + r / 2 of the first r, turned by their angles."""
    x, cos, sin = x.double(), cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    half = cos.shape[-1] // 2
    y = x.clone()
    for j in range(half):
        one, two = x[..., j], x[..., j + half]
        y[..., j] = one * cos[..., j] - two * sin[..., j]
        y[..., j + half] = two * cos[..., j + half] + one * sin[..., j + half]
    return y
