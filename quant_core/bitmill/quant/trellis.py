"""One linear in trellis codes: circles of bits and two kinds of scales.

    w'[n, k] = row_scale[n] * group_scale[g] * value[n, k]        g the group of packed column k

Values come from `bitmill_kernels.trellis.code`; w' are the weights that the rewrites lead to, which
end with a rotation (`rotation.py`). The kind "trellis" of `quant.tensors.KINDS`. What is computed
is what is stored, so one class is both `Quantized` and `Stored`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.quant.rewrites import NO_REWRITES, Rewrites
from bitmill.runtime.ranks import Ranks
from bitmill_kernels.backend import wants_reference
from bitmill_kernels.layout import GROUP_SIZE, group_columns
from bitmill_kernels.trellis import product_cuda
from bitmill_kernels.trellis.layout import TILE, circle_shapes, tile_count
from bitmill_kernels.trellis.product import Member, TrellisWeight


@dataclass(frozen=True, eq=False)
class TrellisTensor:
    """A linear of N rows and K columns, each group at its own rate.

    circles:      u8, by the names and in the shapes of `bitmill_kernels.trellis.layout`
    row_scales:   f16 [N]; group_scales: f16 [G], in column order; finite and not negative
    widths:       rates 1 to 8, one per group
    rewrites:     what leads from the source's columns to packed ones

    Raises FormatError naming the tensor that is missing or illegal.
    """

    N: int
    K: int
    widths: tuple[int, ...]
    circles: dict[str, Tensor]
    row_scales: Tensor
    group_scales: Tensor
    rewrites: Rewrites = NO_REWRITES
    name: str = "weight"
    kind: ClassVar[str] = "trellis"
    module: ClassVar[str] = "bitmill.inference.trellis:TrellisLinear"
    applies: ClassVar[frozenset[str]] = frozenset({"order", "rotation"})

    def __post_init__(self) -> None:
        found = self.circles | {"row_scales": self.row_scales, "group_scales": self.group_scales}
        for key, (dtype, shape) in trellis_shapes(self.N, self.K, self.widths).items():
            name = f"{self.name}.{key}"
            if key not in found:
                raise FormatError(f"tensor {name} is missing from the checkpoint", param=name)
            if found[key].dtype != dtype or tuple(found[key].shape) != shape:
                raise FormatError(
                    f"tensor {name} is {found[key].dtype} of shape {tuple(found[key].shape)}: "
                    f"expected {dtype} of shape {shape}",
                    param=name,
                )
            if dtype == torch.float16:
                _check_scales(found[key], name)
        self.rewrites.check(self.name, self.N, self.K)

    @property
    def order(self) -> Tensor | None:
        """Column order i32 [K], or None where columns keep theirs."""
        return self.rewrites.order

    @property
    def codes(self) -> Tensor:
        """All circles, u8, one behind the other."""
        return torch.cat([self.circles[key].flatten() for key in sorted(self.circles)])

    def codes_sha256(self) -> str:
        """SHA-256 of the bytes of `codes`."""
        return hashlib.sha256(self.codes.cpu().numpy().data).hexdigest()

    def rewritten(self, rewrites: Rewrites) -> TrellisTensor:
        """The same codes with these rewrites."""
        return replace(self, rewrites=rewrites)

    def gathered(self, ranks: Ranks, count: int) -> TrellisTensor:
        """All `count` rows of a linear of which each rank holds its part, whole tiles; scales of
        groups are the same on all."""
        if ranks.size == 1:
            return self
        return replace(
            self,
            N=count,
            circles={key: _gathered(own, key, ranks, count) for key, own in self.circles.items()},
            row_scales=ranks.gather_rows(self.row_scales, count, unit=TILE),
            rewrites=self.rewrites.gathered(ranks, count),
        )

    def pack(self) -> TrellisTensor:
        """Itself."""
        return self

    def unpack(self) -> TrellisTensor:
        """Itself."""
        return self

    def with_rows(self, rows: Tensor) -> TrellisTensor:
        """Raises FormatError unless rows, i64 [N], is 0 to N - 1: tiles hold neighbouring rows."""
        if not torch.equal(rows.cpu(), torch.arange(self.N)):
            raise FormatError(f"rows of {self.name} cannot change places in trellis codes")
        return self

    def packed_values(self) -> Tensor:
        """w' f32 [N, K] in packed columns."""
        device = self.row_scales.device
        if not self.N:
            return torch.empty(0, self.K, device=device)
        if device.type == "cuda" and not wants_reference("auto") and product_cuda.available():
            circles = {key: one.contiguous() for key, one in self.circles.items()}
            scales = self.row_scales, self.group_scales
            return product_cuda.decoded(circles, *scales, self.K, self.widths)
        return Member(self.kernel_weight(), self.K, device).weights(0, self.N)

    def kernel_weight(self) -> TrellisWeight:
        """Itself as the kernels take it."""
        return TrellisWeight(self.circles, self.row_scales, self.group_scales, self.widths)

    def dequantize(self) -> Tensor:
        """Weights f32 [N, K] in the source's columns."""
        return self.rewrites.undo(self.packed_values())

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Tensors by their name in a file, those of rewrites not included."""
        own = self.circles | {"row_scales": self.row_scales, "group_scales": self.group_scales}
        return {f"{prefix}.{key}": tensor for key, tensor in own.items()}

    @classmethod
    def from_tensors(
        cls,
        prefix: str,
        tensors: Mapping[str, Tensor],
        N: int,
        K: int,
        widths: tuple[int, ...],
        rewrites: Rewrites = NO_REWRITES,
    ) -> TrellisTensor:
        """From the tensors `{prefix}.…` of a file. Raises FormatError for illegal ones."""
        found = {}
        for key in trellis_shapes(N, K, widths):
            name = f"{prefix}.{key}"
            if name not in tensors:
                raise FormatError(f"tensor {name} is missing from the checkpoint", param=name)
            found[key] = tensors[name]
        rows, groups = found.pop("row_scales"), found.pop("group_scales")
        return cls(N, K, widths, found, rows, groups, rewrites, prefix)

    @classmethod
    def of_groups(
        cls,
        circles: Sequence[Tensor],
        row_scales: Tensor,
        group_scales: Tensor,
        K: int,
        widths: tuple[int, ...],
    ) -> TrellisTensor:
        """From circles u8 [ceil(N / 16), tile columns, 32 k] of each group, in column order."""
        stored = {}
        for key in circle_shapes(len(row_scales), K, widths):
            if key == "codes_tail":
                stored[key] = circles[-1]
                continue
            full = zip(circles, widths, group_columns(K), strict=True)
            rate = int(key.removeprefix("codes_r"))
            stored[key] = torch.stack([c for c, k, n in full if k == rate and n == GROUP_SIZE])
        return cls(len(row_scales), K, widths, stored, row_scales, group_scales)


def trellis_shapes(
    N: int, K: int, widths: tuple[int, ...]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every stored tensor of a linear but bias and rewrites, in file order.

    Raises FormatError unless there is a legal rate per group.
    """
    try:
        shapes = circle_shapes(N, K, widths)
    except ValueError as error:
        raise FormatError(str(error), param="widths") from error
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        key: (torch.uint8, shape) for key, shape in shapes.items()
    }
    found["row_scales"] = (torch.float16, (N,))
    found["group_scales"] = (torch.float16, (len(widths),))
    return found


def _gathered(own: Tensor, key: str, ranks: Ranks, count: int) -> Tensor:
    """The circles of all tiles that `count` rows have."""
    rows_of_tiles = 0 if key == "codes_tail" else 1
    tiles = own.movedim(rows_of_tiles, 0).contiguous()
    return ranks.gather_rows(tiles, tile_count(count)).movedim(0, rows_of_tiles).contiguous()


def _check_scales(scales: Tensor, name: str) -> None:
    bad = ~(torch.isfinite(scales) & (scales >= 0))
    if bool(bad.any()):
        place = int(bad.nonzero()[0])
        raise FormatError(
            f"tensor {name} holds {float(scales[place])} at {place}: scales are finite and not "
            "negative",
            param=name,
        )
