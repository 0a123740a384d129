"""Codes by name: how the numbers of a group are written as bits. Torch-free.

    affine    scale * (code - zero), a scale and a zero point per row and group (docs/format.md, 1)
    trellis   a function of 16 bits of a stream, a scale per row and one per group (2)

Packed embeddings and heads are in affine codes beside linears in any: their rows are looked up one
by one, where a tile of a trellis holds 16.

`auto` is affine on every machine; docs/methods.md says why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bitmill.config.bit_width_map import DROPPED, WIDTHS
from bitmill.errors import SpecError
from bitmill_kernels.trellis.layout import RATES

CodeName = Literal["auto", "affine", "trellis"]
DEFAULT_WIDTHS = (2, 3, 4, 5, 6, 8)
AUTO = "affine"


@dataclass(frozen=True)
class Code:
    """widths: that groups may have; usual: those of a job that names none; format: in which a job
    stores it that names none (`bitmill.formats.format`); drops: whether groups may be dropped."""

    widths: tuple[int, ...]
    usual: tuple[int, ...]
    format: str
    drops: bool = False

    @property
    def legal(self) -> tuple[int, ...]:
        """Its widths, and that of a dropped group where it has one."""
        return (DROPPED, *self.widths) if self.drops else self.widths


CODES: dict[str, Code] = {
    "affine": Code(WIDTHS, DEFAULT_WIDTHS, "bitmill-1", drops=True),
    "trellis": Code(RATES, RATES, "bitmill-2"),
}


def embedding_width(width: int, legal: Iterable[int]) -> int:
    """Packed embeddings and heads are in affine codes, whatever linears are in: of the legal widths
    that these have, the largest that is at most `width`, else the smallest."""
    known = sorted(set(legal) & set(CODES["affine"].legal))
    return max((one for one in known if one <= width), default=known[0])


def check_widths(code: str, widths: tuple[int, ...], param: str) -> None:
    """Raise `SpecError` naming the widths that the code has not."""
    illegal = sorted(set(widths) - set(CODES[code].legal))
    if illegal:
        raise SpecError(
            f"{param} {list(widths)}: code {code!r} has no width {illegal[0]}, only "
            f"{list(CODES[code].legal)}",
            param=param,
        )
