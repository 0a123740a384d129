"""One quantized linear, as plain tensors and as the planes that are stored.

    w[n, order[k]] = scale[g, n] * (code[n, k] - zero[g, n]),   g the group of packed column k

`QuantizedWeight` is what refinement produces: one byte per code. `PackedTensor` is what a
checkpoint holds: the bit planes of `bitmill_kernels.layout`, packed zeros, scales and the column
order. Both are checked where they are built, so a value that exists is a legal one.

Packed column k is input column order[k]; without an order both are the same. The bias is not
part of either: it is stored and loaded like any other tensor of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitmill.errors import FormatError
from bitmill_kernels.layout import (
    GROUP_SIZE,
    PLANES,
    WIDTHS,
    check_widths,
    code_tensor_shapes,
    group_count,
    zero_bits,
    zero_tensor_shapes,
)
from bitmill_kernels.pack import join_planes, pack_codes, pack_zeros, unpack_codes, unpack_zeros
from bitmill_kernels.reference import dequantize


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes and grid of one linear of N output rows and K input columns in G groups.

    codes:  u8 [N, K], columns in packed order, each at most 2^b - 1 of its group's width b
    scales: f16 [G, N], finite and >= 0
    zeros:  u8 [G, N] as stored: an integer of 0..2^b-1, or eighths 0..15 for width 1
    widths: G bit widths
    order:  i32 [K], a permutation (packed column k is input column order[k]), or None

    Raises FormatError for anything else.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    widths: tuple[int, ...]
    order: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2:
            raise FormatError(
                f"codes are {self.codes.dtype} of shape {tuple(self.codes.shape)}: "
                "give a uint8 matrix [N, K]"
            )
        _check_widths(self.widths, self.K)
        _check_grid(self.scales, self.zeros, (len(self.widths), self.N))
        _check_limits(self.codes, self.zeros, self.widths)
        if self.order is not None:
            check_order(self.order, self.K, "order")

    @property
    def N(self) -> int:  # noqa: N802
        """Output rows."""
        return self.codes.shape[0]

    @property
    def K(self) -> int:  # noqa: N802
        """Input columns."""
        return self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """Weights f32 [N, K] in the source's column order."""
        packed = dequantize(self.codes, self.scales, self.zeros, self.widths)
        return packed if self.order is None else undo_order(packed, self.order)

    def codes_sha256(self) -> str:
        """SHA-256 of the codes as N*K bytes, row by row in packed column order."""
        return hashlib.sha256(self.codes.contiguous().cpu().numpy().data).hexdigest()


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """The stored tensors of one linear.

    planes: `codes_b{b}_p{w}`, `tail_p{w}` and `zeros_b{b}`, u8, shapes as in docs/format.md
    scales: f16 [G, N]; order: i32 [K] or None, whichever linear owns it

    Build it with `pack` or `from_tensors`, which check what they are given.
    """

    N: int
    K: int
    widths: tuple[int, ...]
    planes: dict[str, Tensor]
    scales: Tensor
    order: Tensor | None = None

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> PackedTensor:
        """Pack codes and zeros; exact, `unpack` gives the same values back."""
        planes = pack_codes(weight.codes, weight.widths)
        planes.update(pack_zeros(weight.zeros, weight.widths))
        return cls(weight.N, weight.K, weight.widths, planes, weight.scales, weight.order)

    @classmethod
    def from_tensors(
        cls,
        prefix: str,
        tensors: Mapping[str, Tensor],
        N: int,
        K: int,
        widths: tuple[int, ...],
        order: Tensor | None = None,
    ) -> PackedTensor:
        """Take the tensors named `{prefix}.…` out of a checkpoint's tensors and check them.

        Raises FormatError naming the tensor that is missing, of the wrong shape or dtype, has
        non-finite or negative scales, or nonzero padding bits.
        """
        found = {}
        for key, (dtype, shape) in packed_shapes(N, K, widths).items():
            name = f"{prefix}.{key}"
            if name not in tensors:
                raise FormatError(f"tensor {name} is missing from the checkpoint", param=name)
            found[key] = _require(tensors[name], dtype, shape, name)
        scales = found.pop("scales")
        _check_scales(scales, f"{prefix}.scales")
        _check_padding(found, N, K, widths, prefix)
        if order is not None:
            check_order(order, K, f"{prefix}.order")
        return cls(N, K, widths, found, scales, order)

    def unpack(self) -> QuantizedWeight:
        """Codes u8 [N, K] and stored zeros u8 [G, N], exactly as they were packed."""
        codes = unpack_codes(self.planes, self.widths, self.N, self.K)
        zeros = unpack_zeros(self.planes, self.widths, self.N)
        return QuantizedWeight(codes, self.scales, zeros, self.widths, self.order)

    def with_rows(self, rows: Tensor) -> PackedTensor:
        """The linear whose row n is this one's row rows[n], i64 [N]; exact."""
        zeros = pack_zeros(unpack_zeros(self.planes, self.widths, self.N)[:, rows], self.widths)
        planes = {
            key: zeros[key] if key in zeros else plane.index_select(-2, rows)
            for key, plane in self.planes.items()
        }
        return replace(self, planes=planes, scales=self.scales[:, rows])

    def tensors(self, prefix: str, *, owns_order: bool = True) -> dict[str, Tensor]:
        """Tensors by their name in the checkpoint.

        `owns_order=False` leaves the order out: another linear that reads the same input stores it.
        """
        named = {f"{prefix}.{key}": tensor for key, tensor in self.planes.items()}
        named[f"{prefix}.scales"] = self.scales
        if self.order is not None and owns_order:
            named[f"{prefix}.order"] = self.order
        return named


def packed_shapes(
    N: int, K: int, widths: tuple[int, ...]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every stored tensor of a linear but its order and bias, in file order."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, shape in code_tensor_shapes(N, K, widths).items():
        shapes[key] = (torch.uint8, shape)
    shapes["scales"] = (torch.float16, (group_count(K), N))
    for key, shape in zero_tensor_shapes(N, widths).items():
        shapes[key] = (torch.uint8, shape)
    return shapes


def undo_order(weight: Tensor, order: Tensor) -> Tensor:
    """Columns of `weight` [N, K] moved from packed to source order; `order` i32 [K]."""
    source = torch.empty_like(weight)
    source[:, order.long()] = weight
    return source


def check_order(order: Tensor, K: int, name: str) -> None:
    """Raise FormatError unless `order` is an i32 permutation of 0..K-1."""
    _require(order, torch.int32, (K,), name)
    if not torch.equal(order.long().sort().values, torch.arange(K, device=order.device)):
        raise FormatError(f"tensor {name} is not a permutation of 0..{K - 1}", param=name)


def _check_widths(widths: tuple[int, ...], K: int) -> None:
    try:
        check_widths(widths, K)
    except ValueError as error:
        raise FormatError(str(error), param="widths") from error


def _check_grid(scales: Tensor, zeros: Tensor, shape: tuple[int, int]) -> None:
    _require(scales, torch.float16, shape, "scales")
    _require(zeros, torch.uint8, shape, "zeros")
    _check_scales(scales, "scales")


def _check_scales(scales: Tensor, name: str) -> None:
    bad = ~(torch.isfinite(scales) & (scales >= 0))
    if bool(bad.any()):
        group, row = (int(i) for i in bad.nonzero()[0])
        raise FormatError(
            f"tensor {name} holds {float(scales[group, row])} for group {group}, row {row}: "
            "scales are finite and not negative",
            param=name,
        )


def _check_limits(codes: Tensor, zeros: Tensor, widths: tuple[int, ...]) -> None:
    if not codes.numel():
        return
    columns = codes.amax(0).cpu().split(GROUP_SIZE)
    of_codes = torch.stack([part.amax() for part in columns]).tolist()
    of_zeros = zeros.amax(1).tolist()
    for group, width in enumerate(widths):
        _check_limit(of_codes[group], width, group, "code")
        _check_limit(of_zeros[group], zero_bits(width), group, "zero")


def _check_limit(largest: int, bits: int, group: int, what: str) -> None:
    if largest >> bits:
        raise FormatError(
            f"{what} {largest} of group {group} does not fit {bits} bits: "
            f"the largest is {2**bits - 1}",
            param=f"{what}s",
        )


def _check_padding(
    planes: Mapping[str, Tensor], N: int, K: int, widths: tuple[int, ...], prefix: str
) -> None:
    for key in _padded_planes(planes, N, K, widths):
        name = f"{prefix}.{key}"
        raise FormatError(f"tensor {name} has padding bits that are not 0", param=name)


def _padded_planes(
    planes: Mapping[str, Tensor], N: int, K: int, widths: tuple[int, ...]
) -> Iterator[str]:
    """Names of the planes whose bits beyond the last column or row are not all zero."""
    tail = K % GROUP_SIZE
    for plane in PLANES[widths[-1]] if tail % 8 else ():
        key = f"tail_p{plane}"
        if key in planes and bool(join_planes([planes[key]], plane)[:, tail:].any()):
            yield key
    for width in WIDTHS:
        used = N * zero_bits(width) % 8
        key = f"zeros_b{width}"
        if used and key in planes and bool((planes[key][:, -1] >> used).any()):
            yield key


def _require(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(
            f"tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}: "
            f"expected {dtype} of shape {shape}",
            param=name,
        )
    return tensor
