"""Packing of codes and zero points into the stored planes, and back; exact for every shape.

The rule is in `layout.py`. Both directions are whole-tensor operations on any device. They hold
one unpacked width class at a time, so the peak is about twice the unpacked codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitmill_kernels.layout import (
    GROUP_SIZE,
    PLANES,
    WIDTHS,
    check_widths,
    code_tensor_shapes,
    groups_of_width,
    plane_bytes,
    zero_bits,
    zero_tensor_shapes,
)


def pack_codes(codes: Tensor, widths: Sequence[int]) -> dict[str, Tensor]:
    """Pack codes u8 [N, K], columns in packed order, into planes named as in the format.

    Returns `codes_b{b}_p{w}` u8 [G_b, N, 16w] and `tail_p{w}` u8 [N, w*ceil(c/8)].
    Raises ValueError for a wrong dtype or width, or a code that its width cannot hold.
    """
    _require_u8_matrix(codes, "codes")
    N, K = codes.shape
    check_widths(widths, K)
    full, tail = divmod(K, GROUP_SIZE)
    planes: dict[str, Tensor] = {}
    grouped = codes[:, : full * GROUP_SIZE].reshape(N, full, GROUP_SIZE)
    for width in PLANES if N else ():
        groups = groups_of_width(widths[:full], width)
        if groups:
            of_width = grouped[:, groups].transpose(0, 1)
            _require_codes_fit(of_width, width)
            for plane, part in _split(of_width, width):
                planes[f"codes_b{width}_p{plane}"] = _pack_plane(part, plane)
    if tail and N:
        rest = codes[:, full * GROUP_SIZE :]
        _require_codes_fit(rest, widths[-1])
        padded = torch.nn.functional.pad(rest, (0, -tail % 8))
        for plane, part in _split(padded, widths[-1]):
            planes[f"tail_p{plane}"] = _pack_plane(part, plane)
    return planes


def unpack_codes(tensors: Mapping[str, Tensor], widths: Sequence[int], N: int, K: int) -> Tensor:
    """Undo `pack_codes`: codes u8 [N, K]. Other names in `tensors` are ignored.

    Codes of dropped groups are 0. Raises ValueError for a missing plane or one of the wrong shape
    or dtype.
    """
    shapes = code_tensor_shapes(N, K, widths)
    planes = {name: _checked(tensors, name, shape) for name, shape in shapes.items()}
    device = next(iter(planes.values())).device if planes else None
    codes = torch.zeros(N, K, dtype=torch.uint8, device=device)
    full, tail = divmod(K, GROUP_SIZE)
    grouped = codes[:, : full * GROUP_SIZE].unflatten(1, (full, GROUP_SIZE)) if full else codes
    for width in WIDTHS if N else ():
        groups = groups_of_width(widths[:full], width)
        if groups:
            parts = [planes[f"codes_b{width}_p{plane}"] for plane in PLANES[width]]
            grouped[:, groups] = join_planes(parts, width).transpose(0, 1)
    if tail and N and widths[-1]:
        parts = [planes[f"tail_p{plane}"] for plane in PLANES[widths[-1]]]
        codes[:, full * GROUP_SIZE :] = join_planes(parts, widths[-1])[:, :tail]
    return codes


def pack_zeros(zeros: Tensor, widths: Sequence[int]) -> dict[str, Tensor]:
    """Pack stored zero points u8 [G, N] into `zeros_b{b}` u8 [Z_b, ceil(N*z/8)].

    Width 1 takes 0..15 (the zero point in eighths), every other width 0..2^b-1, which of a dropped
    group leaves 0; a larger value raises ValueError.
    """
    _require_u8_matrix(zeros, "zeros")
    G, N = zeros.shape
    if len(widths) != G:
        raise ValueError(f"{len(widths)} widths for {G} groups of zeros: give one per group")
    packed: dict[str, Tensor] = {}
    for width in PLANES if N else ():
        groups = groups_of_width(widths, width)
        if groups:
            _require_zeros_fit(zeros[groups], width)
        if groups and width:
            packed[f"zeros_b{width}"] = _pack_bits(zeros[groups], zero_bits(width))
    return packed


def unpack_zeros(tensors: Mapping[str, Tensor], widths: Sequence[int], N: int) -> Tensor:
    """Undo `pack_zeros`: stored zero points u8 [G, N]."""
    shapes = zero_tensor_shapes(N, widths)
    packed = {name: _checked(tensors, name, shape) for name, shape in shapes.items()}
    device = next(iter(packed.values())).device if packed else None
    zeros = torch.zeros(len(widths), N, dtype=torch.uint8, device=device)
    for width in WIDTHS if N else ():
        groups = groups_of_width(widths, width)
        if groups:
            zeros[groups] = _unpack_bits(packed[f"zeros_b{width}"], zero_bits(width), N)
    return zeros


def join_planes(planes: Sequence[Tensor], width: int) -> Tensor:
    """Codes u8 [..., 8*L/w] of one width from its planes u8 [..., L], low plane first."""
    codes = _unpack_plane(planes[0], PLANES[width][0])
    if len(planes) > 1:
        codes |= _unpack_plane(planes[1], PLANES[width][1]) << PLANES[width][0]
    return codes


def _split(codes: Tensor, width: int) -> list[tuple[int, Tensor]]:
    """(plane width, its part of the codes) for each plane of a width."""
    if not width:
        return []
    low, *high = PLANES[width]
    parts = [(low, codes & ((1 << low) - 1))]
    return parts + [(plane, codes >> low) for plane in high]


def _pack_plane(part: Tensor, plane: int) -> Tensor:
    fields = 8 // plane
    length = plane_bytes(plane, part.shape[-1])
    columns = part.unflatten(-1, (fields, length))
    packed: Tensor = columns[..., 0, :].clone(memory_format=torch.contiguous_format)
    for field in range(1, fields):
        packed |= columns[..., field, :] << (plane * field)
    return packed


def _unpack_plane(packed: Tensor, plane: int) -> Tensor:
    mask = (1 << plane) - 1
    return torch.cat([(packed >> (plane * j)) & mask for j in range(8 // plane)], dim=-1)


def _pack_bits(values: Tensor, bits: int) -> Tensor:
    """Bit stream u8 [Z, ceil(N*bits/8)] of values u8 [Z, N], least significant bit first."""
    stream = ((values[..., None] >> _shifts(bits, values)) & 1).flatten(1)
    bytes_of_bits = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    packed: Tensor = (bytes_of_bits << _shifts(8, values)).sum(-1, dtype=torch.uint8)
    return packed


def _unpack_bits(packed: Tensor, bits: int, N: int) -> Tensor:
    stream = ((packed[..., None] >> _shifts(8, packed)) & 1).flatten(1)[:, : N * bits]
    fields = stream.unflatten(1, (N, bits)) << _shifts(bits, packed)
    values: Tensor = fields.sum(-1, dtype=torch.uint8)
    return values


def _shifts(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


def _require_u8_matrix(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.dim() != 2:
        raise ValueError(
            f"{name} are {tensor.dtype} of shape {tuple(tensor.shape)}: give a uint8 matrix"
        )


def _require_codes_fit(codes: Tensor, width: int) -> None:
    largest = int(codes.max())
    if largest >> width:
        raise ValueError(
            f"code {largest} does not fit width {width}: the largest is {2**width - 1}"
        )


def _require_zeros_fit(zeros: Tensor, width: int) -> None:
    largest = int(zeros.max())
    if largest >> zero_bits(width):
        limit = 2 ** zero_bits(width) - 1
        raise ValueError(f"zero {largest} does not fit width {width}: the largest is {limit}")


def _checked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing: expected u8 of shape {shape}")
    tensor = tensors[name]
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != shape:
        raise ValueError(
            f"tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}: "
            f"expected uint8 of shape {shape}"
        )
    return tensor
