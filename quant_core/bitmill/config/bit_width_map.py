"""Exact accounting of what a bit-width map costs, and the map itself. Torch-free.

For a linear of N rows and K columns in groups of c <= 128 columns, one width b per group:

    codes   N * 16 * b bytes for a full group, N * b * ceil(c / 8) for the short last one
    scales  2 * N bytes per group (fp16)
    zeros   ceil(N * z / 8) bytes per group, z = b, but 4 where b = 1
    order   4 * K bytes, once per distinct stored column order
    outliers   2 * N + 4 bytes for every column that is kept in 16 bits

A group of width 0 is dropped: its weights are 0 and it takes no bytes.

Every size that the allocator, the command line and the reports show comes from here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import not_
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from bitmill.config.made_for import MadeFor
from bitmill.errors import FormatError, absent, reason
from bitmill_kernels.layout import GROUP_SIZE, PLANES, WIDTHS, group_columns, zero_bits

__all__ = [
    "DROPPED",
    "GROUP_SIZE",
    "LEGAL_WIDTHS",
    "MAP_NAME",
    "NO_OUTLIERS",
    "OUTLIER_BITS",
    "PLANES",
    "WIDTHS",
    "BitWidthMap",
    "LinearShape",
    "code_bits",
    "group_bytes",
    "group_columns",
    "outlier_bytes",
]

DROPPED = 0
"""The width of a group that is dropped."""
LEGAL_WIDTHS = (DROPPED, 1, 2, 3, 4, 5, 6, 7, 8)
"""Widths that some code has (`bitmill.config.codes`); `WIDTHS` are those of affine codes."""

OUTLIER_BITS = 16
"""Of a value in a column that is kept."""
NO_OUTLIERS: Mapping[str, int] = MappingProxyType({})

MAP_NAME = "bit_width_map.json"
"""File of a packed folder's bit-width map."""


@dataclass(frozen=True)
class LinearShape:
    """A linear that may be quantized: full name, N output rows, K input columns."""

    name: str
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        """N * K."""
        return self.rows * self.columns

    @property
    def groups(self) -> int:
        """G = ceil(K / 128)."""
        return -(-self.columns // GROUP_SIZE)


class BitWidthMap(BaseModel):
    """For every quantized linear, the width of each of its groups, in packed column order.

    In JSON the widths are a string of digits, one per group: {"layers.0.mlp.up_proj": "33432"}.
    order: the column order the groups were formed in. outliers: number of columns that are kept in
    16 bits, of the linears that have some. made_for: the model whose sensitivities it follows,
    where that is known; no part of what is compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    group_size: Literal[128] = 128
    order: Literal["natural", "activation"] = "natural"
    linears: dict[str, tuple[int, ...]]
    outliers: dict[str, Annotated[int, Field(ge=1)]] = Field(default={}, exclude_if=not_)
    made_for: MadeFor | None = Field(default=None, exclude_if=not_)

    @field_validator("linears", mode="before")
    @classmethod
    def _parse_digits(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            name: tuple(int(d) for d in widths)
            if isinstance(widths, str) and widths.isdecimal()
            else widths
            for name, widths in value.items()
        }

    @field_validator("linears")
    @classmethod
    def _legal_widths(cls, linears: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        for name, widths in linears.items():
            illegal = sorted(set(widths) - set(LEGAL_WIDTHS))
            if illegal or not widths:
                raise ValueError(
                    f"{name}: widths {illegal or 'missing'}; one per group of {list(LEGAL_WIDTHS)}"
                )
        return linears

    @model_validator(mode="after")
    def _outliers_of_linears(self) -> Self:
        unknown = sorted(self.outliers.keys() - self.linears.keys())
        if unknown:
            raise ValueError(f"outliers of {unknown[0]}, which has no widths")
        return self

    @field_serializer("linears")
    def _digits(self, linears: dict[str, tuple[int, ...]]) -> dict[str, str]:
        return {name: "".join(map(str, widths)) for name, widths in linears.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BitWidthMap):
            return NotImplemented
        return self._compared == other._compared

    @property
    def _compared(self) -> tuple[object, ...]:
        return self.order, self.linears, self.outliers

    def of(self, made_for: MadeFor | None) -> BitWidthMap:
        """The same widths, said to be made for this model; None: for nobody knows which."""
        return self.model_copy(update={"made_for": made_for})

    def check_shapes(self, shapes: Iterable[LinearShape]) -> None:
        """Raise `FormatError` unless the map covers exactly these linears, group for group."""
        shapes = tuple(shapes)
        expected = {shape.name: shape.groups for shape in shapes}
        missing = sorted(expected.keys() - self.linears.keys())
        extra = sorted(self.linears.keys() - expected.keys())
        if missing or extra:
            raise FormatError(
                f"bit-width map does not fit the model: {len(missing)} linears missing "
                f"(first: {missing[:1]}), {len(extra)} unknown (first: {extra[:1]})"
            )
        for name, groups in expected.items():
            if len(self.linears[name]) != groups:
                raise FormatError(
                    f"bit-width map gives {len(self.linears[name])} groups to {name}, "
                    f"which has {groups}"
                )
        columns = {shape.name: shape.columns for shape in shapes}
        for name, count in self.outliers.items():
            if count >= columns[name]:
                raise FormatError(
                    f"bit-width map keeps {count} outlier columns of {name}, which has "
                    f"{columns[name]}: keep fewer"
                )

    @classmethod
    def uniform(
        cls,
        shapes: Iterable[LinearShape],
        width: int,
        order: Literal["natural", "activation"] = "natural",
    ) -> BitWidthMap:
        """One width for all groups of these linears."""
        linears = {shape.name: (width,) * shape.groups for shape in shapes}
        return cls(order=order, linears=linears)

    def to_json(self) -> str:
        """Canonical JSON text: two spaces of indent, linears in the map's order."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> BitWidthMap:
        """Read a map file; raises `FormatError` for anything else. That of a packed folder has what
        it was made for beside it."""
        try:
            found = cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FormatError(absent(path)) from error
        except (OSError, ValueError) as error:
            raise FormatError(f"{path.name} is not a bit-width map: {reason(error)}") from error
        beside = MadeFor.beside(path.parent) if path.name == MAP_NAME else None
        return found if beside is None else found.of(beside)


def group_bytes(width: int, rows: int, columns: int) -> int:
    """Stored bytes of one group of `columns` <= 128 columns: codes, scales and zeros."""
    if width == DROPPED:
        return 0
    codes = rows * width * (GROUP_SIZE // 8 if columns == GROUP_SIZE else -(-columns // 8))
    return codes + 2 * rows + -(-rows * zero_bits(width) // 8)


def outlier_bytes(rows: int, count: int) -> int:
    """Stored bytes of `count` columns of a linear that are kept in 16 bits, and their places."""
    return count * (2 * rows + 4)


def code_bits(shapes: Iterable[LinearShape], linears: Mapping[str, Sequence[int]]) -> float:
    """Mean width over weights: sum(b * N * c) / sum(N * K) of the linears in the map."""
    spent = total = 0
    for shape in shapes:
        if shape.name in linears:
            columns = group_columns(shape.columns)
            spent += shape.rows * sum(
                b * c for b, c in zip(linears[shape.name], columns, strict=True)
            )
            total += shape.weights
    return spent / total if total else 0.0
