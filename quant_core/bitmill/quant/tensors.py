"""One quantized linear, as plain tensors and as the planes that are stored.

    w[n, k] = scale[g, n] * (code[n, k] - zero[g, n])           g the group of packed column k

`QuantizedWeight` is what refinement produces: one byte per code. `PackedTensor` is what a
checkpoint holds: the bit planes of `bitmill_kernels.layout`, packed zeros and scales. Both are
checked where they are built, so a value that exists is a legal one.

Packed columns are those that the weight's rewrites lead to (`rewrites.py`), today a column order;
without rewrites they are the source's. The bias is not part of either: it is stored and loaded like
any other tensor of the model.

Both are of the kind "affine". A solver may give another kind, whose classes answer the calls of
`Quantized` and `Stored`; files name the kind, and `KINDS` finds the stored class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.quant.rewrites import NO_REWRITES, Rewrites
from bitmill.registry import Registry
from bitmill.runtime.ranks import Ranks
from bitmill_kernels.layout import (
    GROUP_SIZE,
    PLANES,
    WIDTHS,
    check_widths,
    code_tensor_shapes,
    kept_groups,
    scale_tensor_shapes,
    zero_bits,
    zero_tensor_shapes,
)
from bitmill_kernels.pack import join_planes, pack_codes, pack_zeros, unpack_codes, unpack_zeros
from bitmill_kernels.reference import dequantize


class Quantized(Protocol):
    """A quantized linear of N rows and K columns, as a solver gives it."""

    @property
    def N(self) -> int:  # noqa: N802
        """Output rows."""

    @property
    def K(self) -> int:  # noqa: N802
        """Input columns."""

    @property
    def widths(self) -> tuple[int, ...]:
        """One per group."""

    @property
    def rewrites(self) -> Rewrites:
        """What leads to its columns, the first one first."""

    @property
    def codes(self) -> Tensor:
        """The u8 tensor whose bytes stand for the codes in hashes."""

    def rewritten(self, rewrites: Rewrites) -> Self:
        """The same codes with these rewrites."""

    def dequantize(self) -> Tensor:
        """Weights f32 [N, K] in the source's columns."""

    def codes_sha256(self) -> str:
        """SHA-256 of the bytes of `codes`."""

    def gathered(self, ranks: Ranks, count: int) -> Self:
        """All `count` rows of a linear of which each rank holds its part."""

    def pack(self) -> Stored:
        """The stored form; exact, `unpack` gives the same values back."""


class Stored(Protocol):
    """A quantized linear as files hold it.

    kind: its name in `KINDS`. module: place of the `torch.nn.Module` that computes with it, which
    has `from_packed(stored)`. applies: names of the rewrites that this module applies itself.
    """

    kind: ClassVar[str]
    module: ClassVar[str]
    applies: ClassVar[frozenset[str]]

    @property
    def N(self) -> int:  # noqa: N802
        """Output rows."""

    @property
    def K(self) -> int:  # noqa: N802
        """Input columns."""

    @property
    def widths(self) -> tuple[int, ...]:
        """One per group."""

    @property
    def rewrites(self) -> Rewrites:
        """As those of what was packed."""

    def rewritten(self, rewrites: Rewrites) -> Self:
        """The same tensors with these rewrites."""

    def with_rows(self, rows: Tensor) -> Self:
        """The linear whose row n is this one's row rows[n], i64 [N]; exact."""

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Tensors by their name in a file, those of rewrites not included."""

    @classmethod
    def from_tensors(
        cls,
        prefix: str,
        tensors: Mapping[str, Tensor],
        N: int,
        K: int,
        widths: tuple[int, ...],
        rewrites: Rewrites = NO_REWRITES,
    ) -> Self:
        """From the tensors `{prefix}.…` of a file. Raises FormatError for illegal ones."""

    def unpack(self) -> Quantized:
        """What was packed."""


KINDS: Registry[type[Stored]] = Registry(
    "kind of tensor",
    "bitmill.tensors",
    {
        "affine": "bitmill.quant.tensors:PackedTensor",
        "trellis": "bitmill.quant.trellis:TrellisTensor",
    },
)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes and grid of one linear of N output rows and K input columns in G groups.

    codes:    u8 [N, K], in packed columns, each at most 2^b - 1 of its group's width b
    scales:   f16 [G, N], finite and >= 0; 0 in dropped groups, those of width 0
    zeros:    u8 [G, N] as stored: an integer of 0..2^b-1, or eighths 0..15 for width 1
    widths:   G bit widths
    rewrites: what leads from the source's columns to packed ones

    Raises FormatError for anything else.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    widths: tuple[int, ...]
    rewrites: Rewrites = NO_REWRITES

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2:
            raise FormatError(
                f"codes are {self.codes.dtype} of shape {tuple(self.codes.shape)}: "
                "give a uint8 matrix [N, K]"
            )
        _check_widths(self.widths, self.K)
        _check_grid(self.scales, self.zeros, (len(self.widths), self.N))
        _check_limits(self.codes, self.zeros, self.widths)
        _check_dropped(self.scales, self.widths)
        self.rewrites.check("weight", self.N, self.K)

    @property
    def N(self) -> int:  # noqa: N802
        """Output rows."""
        return self.codes.shape[0]

    @property
    def K(self) -> int:  # noqa: N802
        """Input columns."""
        return self.codes.shape[1]

    @property
    def order(self) -> Tensor | None:
        """Column order i32 [K], or None where columns keep their order."""
        return self.rewrites.order

    def rewritten(self, rewrites: Rewrites) -> QuantizedWeight:
        """The same codes with these rewrites."""
        return replace(self, rewrites=rewrites)

    def dequantize(self) -> Tensor:
        """Weights f32 [N, K] in the source's columns."""
        return self.rewrites.undo(dequantize(self.codes, self.scales, self.zeros, self.widths))

    def codes_sha256(self) -> str:
        """SHA-256 of the codes as N*K bytes, row by row in packed column order."""
        return hashlib.sha256(self.codes.contiguous().cpu().numpy().data).hexdigest()

    def gathered(self, ranks: Ranks, count: int) -> QuantizedWeight:
        """All `count` rows of a linear of which each rank holds its part."""
        if ranks.size == 1:
            return self
        codes, scales, zeros = (
            ranks.gather_rows(rows.contiguous(), count)
            for rows in (self.codes, self.scales.T, self.zeros.T)
        )
        grid = scales.T.contiguous(), zeros.T.contiguous()
        return QuantizedWeight(codes, *grid, self.widths, self.rewrites.gathered(ranks, count))

    def pack(self) -> PackedTensor:
        """Bit planes and packed zeros; exact, `unpack` gives the same values back."""
        planes = pack_codes(self.codes, self.widths)
        planes.update(pack_zeros(self.zeros, self.widths))
        return PackedTensor(self.N, self.K, self.widths, planes, self.scales, self.rewrites)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """The stored tensors of one linear.

    planes: `codes_b{b}_p{w}`, `tail_p{w}` and `zeros_b{b}`, u8, shapes as in docs/format.md
    scales: f16 [G, N]; those of dropped groups are 0 and not stored
    rewrites: what leads from the source's columns to packed ones

    Build it with `QuantizedWeight.pack` or `from_tensors`, which check what they are given.
    """

    N: int
    K: int
    widths: tuple[int, ...]
    planes: dict[str, Tensor]
    scales: Tensor
    rewrites: Rewrites = NO_REWRITES
    kind: ClassVar[str] = "affine"
    module: ClassVar[str] = "bitmill.inference.linear:QuantizedLinear"
    applies: ClassVar[frozenset[str]] = frozenset({"order", "outliers"})

    @property
    def order(self) -> Tensor | None:
        """Column order i32 [K], whichever linear owns it, or None where columns keep theirs."""
        return self.rewrites.order

    def rewritten(self, rewrites: Rewrites) -> PackedTensor:
        """The same tensors with these rewrites."""
        return replace(self, rewrites=rewrites)

    @classmethod
    def from_tensors(
        cls,
        prefix: str,
        tensors: Mapping[str, Tensor],
        N: int,
        K: int,
        widths: tuple[int, ...],
        rewrites: Rewrites = NO_REWRITES,
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
        scales = _of_all_groups(found.pop("scales", None), N, widths)
        _check_scales(scales, f"{prefix}.scales")
        _check_padding(found, N, K, widths, prefix)
        rewrites.check(prefix, N, K)
        return cls(N, K, widths, found, scales, rewrites)

    def unpack(self) -> QuantizedWeight:
        """Codes u8 [N, K] and stored zeros u8 [G, N], exactly as they were packed."""
        codes = unpack_codes(self.planes, self.widths, self.N, self.K)
        zeros = unpack_zeros(self.planes, self.widths, self.N)
        return QuantizedWeight(codes, self.scales, zeros, self.widths, self.rewrites)

    def with_rows(self, rows: Tensor) -> PackedTensor:
        """The linear whose row n is this one's row rows[n], i64 [N]; exact."""
        zeros = pack_zeros(unpack_zeros(self.planes, self.widths, self.N)[:, rows], self.widths)
        planes = {
            key: zeros[key] if key in zeros else plane.index_select(-2, rows)
            for key, plane in self.planes.items()
        }
        rewrites = self.rewrites.with_rows(rows)
        return replace(self, planes=planes, scales=self.scales[:, rows], rewrites=rewrites)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Tensors by their name in the checkpoint, those of rewrites not included."""
        named = {f"{prefix}.{key}": tensor for key, tensor in self.planes.items()}
        if kept := kept_groups(self.widths):
            every = len(kept) == len(self.widths)
            named[f"{prefix}.scales"] = self.scales if every else self.scales[kept]
        return named


def affine(weights: Mapping[str, Quantized]) -> dict[str, QuantizedWeight]:
    """Weights of the kind "affine" by name. Raises FormatError for the first of another kind."""
    found = {}
    for name, weight in weights.items():
        if not isinstance(weight, QuantizedWeight):
            raise FormatError(f"{name} has no scales and zero points of an affine grid", param=name)
        found[name] = weight
    return found


def packed_shapes(
    N: int, K: int, widths: tuple[int, ...]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every stored tensor of a linear but bias and rewrites, in file order."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, shape in code_tensor_shapes(N, K, widths).items():
        shapes[key] = (torch.uint8, shape)
    for key, shape in scale_tensor_shapes(N, widths).items():
        shapes[key] = (torch.float16, shape)
    for key, shape in zero_tensor_shapes(N, widths).items():
        shapes[key] = (torch.uint8, shape)
    return shapes


def _of_all_groups(stored: Tensor | None, N: int, widths: tuple[int, ...]) -> Tensor:
    """Scales f16 [G, N] from those of groups that are not dropped; None where all are."""
    kept = kept_groups(widths)
    if stored is None:
        return torch.zeros(len(widths), N, dtype=torch.float16)
    if len(kept) == len(widths):
        return stored
    scales = stored.new_zeros(len(widths), N)
    scales[kept] = stored
    return scales


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


def _check_dropped(scales: Tensor, widths: tuple[int, ...]) -> None:
    for group, width in enumerate(widths):
        if width == 0 and bool(scales[group].any()):
            raise FormatError(
                f"group {group} has width 0, which drops it, and scales that are not 0",
                param="scales",
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
