"""The `quantization_config` of a packed checkpoint's config.json. Torch-free.

    {"quant_method": "bitmill", "format_version": 1, "group_size": 128,
     "linears": {name: {"widths": "33432", "order": name of a tensor, or null}}}

One digit of `widths` per group, in packed column order. `order` names the i32 [K] tensor that
holds the linear's column order: its own, or that of another linear with the same input.

Version 2 says the code of all its groups, with its constants, under "code"; version 1 is of affine
codes and has no such key. Version 3 is version 1 where linears keep columns in 16 bits beside their
codes: those have a key more, "outliers", their number. Version 4 is version 2 where some matrices,
the embedding and the head, are in affine codes: those have a key more, "code".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bitmill.config.bit_width_map import GROUP_SIZE, BitWidthMap
from bitmill.config.codes import CODES
from bitmill.errors import FormatError
from bitmill_kernels.trellis.layout import FLIPPED, KEPT, MULTIPLIER, STATE_BITS, TILE

QUANT_METHOD = "bitmill"
VERSIONS = {"affine": 1, "trellis": 2}
"""Format version by code, where no linear has outliers."""
WITH_OUTLIERS = 3
"""Version of affine codes with outliers."""
WITH_AFFINE = 4
"""Version of trellis codes beside affine ones."""
TRELLIS = {
    "name": "trellis",
    "state_bits": STATE_BITS,
    "multiplier": MULTIPLIER,
    "kept": KEPT,
    "flipped": FLIPPED,
    "tile": TILE,
}
"""What version 2 says of its code; a reader knows no other constants."""


@dataclass(frozen=True)
class PackedLinear:
    """What config.json says of one quantized linear."""

    name: str
    widths: tuple[int, ...]
    order: str | None = None
    outliers: int = 0
    code: str = "affine"

    @property
    def owns_order(self) -> bool:
        """Whether the order is stored under the linear's own name."""
        return self.order == f"{self.name}.order"


@dataclass(frozen=True)
class PackedConfig:
    """The quantized linears of a checkpoint, by full name, and the code of those of its blocks."""

    linears: dict[str, PackedLinear]
    code: str = "affine"

    @classmethod
    def from_map(
        cls,
        bit_widths: BitWidthMap,
        orders: Mapping[str, str | None] | None = None,
        code: str = "affine",
        affine: Collection[str] = (),
    ) -> PackedConfig:
        """Describe a map; `orders` gives the order tensor of the linears that have one. affine:
        names of those in affine codes, whatever `code` of the others is."""
        orders = orders or {}
        return cls(
            {
                name: PackedLinear(
                    name,
                    tuple(widths),
                    orders.get(name),
                    bit_widths.outliers.get(name, 0),
                    "affine" if name in affine else code,
                )
                for name, widths in bit_widths.linears.items()
            },
            code,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PackedConfig:
        """Read what `to_dict` made. Raises FormatError for anything else."""
        expected = {"quant_method": QUANT_METHOD, "group_size": GROUP_SIZE}
        version = data.get("format_version")
        versions = {known: name for name, known in VERSIONS.items()}
        versions |= {WITH_OUTLIERS: "affine", WITH_AFFINE: "trellis"}
        code = versions.get(version) if isinstance(version, int) else None
        if code is None:
            raise FormatError(
                f"format_version {version!r} is unknown: this release reads "
                f"{', '.join(map(str, versions))}; update bitmill",
                code="unknown_format_version",
                param="quantization_config.format_version",
            )
        if code == "trellis":
            expected["code"] = TRELLIS
        for key, value in expected.items():
            if data.get(key) != value:
                raise _refusal(key, f"is {data.get(key)!r}, expected {value!r}")
        for key in data.keys() - expected.keys() - {"format_version", "linears"}:
            raise _refusal(key, f"is not a key of format version {version}")
        linears = data.get("linears")
        if not isinstance(linears, Mapping) or not linears:
            raise _refusal("linears", "must name at least one quantized linear")
        mixed = version == WITH_AFFINE
        parsed = {name: _parse_linear(name, entry, code, mixed) for name, entry in linears.items()}
        if any(linear.outliers for linear in parsed.values()) != (version == WITH_OUTLIERS):
            raise _refusal(
                "linears", f"of version {version} say otherwise whether there are outliers"
            )
        if any(linear.code != code for linear in parsed.values()) != mixed:
            raise _refusal("linears", f"of version {version} are all in code {code!r}")
        _check_orders(parsed)
        return cls(parsed, code)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that config.json holds under `quantization_config`."""
        linears = {
            name: {"widths": "".join(map(str, linear.widths)), "order": linear.order}
            | ({"outliers": linear.outliers} if linear.outliers else {})
            | ({"code": linear.code} if linear.code != self.code else {})
            for name, linear in self.linears.items()
        }
        said: dict[str, Any] = {"code": TRELLIS} if self.code == "trellis" else {}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.version,
            "group_size": GROUP_SIZE,
            **said,
            "linears": linears,
        }

    @property
    def version(self) -> int:
        """The smallest version that has a place for all of it."""
        if any(linear.code != self.code for linear in self.linears.values()):
            return WITH_AFFINE
        return WITH_OUTLIERS if self.outliers else VERSIONS[self.code]

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Widths by linear."""
        return {name: linear.widths for name, linear in self.linears.items()}

    @property
    def outliers(self) -> dict[str, int]:
        """Number of outlier columns of the linears that have some."""
        return {name: one.outliers for name, one in self.linears.items() if one.outliers}

    @property
    def orders(self) -> dict[str, str | None]:
        """Name of the order tensor by linear, None where columns keep their order."""
        return {name: linear.order for name, linear in self.linears.items()}


def require_affine(linear: PackedLinear) -> None:
    """Raise FormatError for an embedding or a head in another code."""
    if linear.code != "affine":
        raise FormatError(
            f"{linear.name} is in {linear.code} codes: embeddings and heads are read in affine "
            "codes only",
            param=linear.name,
        )


def _parse_linear(name: str, entry: Any, code: str, mixed: bool) -> PackedLinear:
    """code: of the checkpoint; mixed: whether a linear may be in affine codes instead."""
    where, more = f"linears.{name}", "code" if mixed else "outliers"
    if not isinstance(entry, Mapping) or entry.keys() - {more} != {"widths", "order"}:
        raise _refusal(where, f"must have exactly the keys widths and order, and maybe {more}")
    if entry.get("code", "affine") != "affine":
        raise _refusal(where, f"has code {entry['code']!r}: 'affine', or no such key")
    code = entry.get("code", code)
    legal = CODES[code].legal
    widths, order, outliers = entry["widths"], entry["order"], entry.get("outliers")
    if "outliers" in entry and (type(outliers) is not int or outliers < 1):
        raise _refusal(where, f"has outliers {outliers!r}: a number of columns, at least 1")
    if not isinstance(widths, str) or not widths or set(widths) - set(map(str, legal)):
        raise _refusal(where, f"has widths {widths!r}: one digit of {list(legal)} per group")
    if order is not None and not (isinstance(order, str) and order.endswith(".order")):
        raise _refusal(where, f"has order {order!r}: the name of a tensor `….order`, or null")
    return PackedLinear(name, tuple(int(digit) for digit in widths), order, outliers or 0, code)


def _check_orders(linears: Mapping[str, PackedLinear]) -> None:
    """Every order that is named is owned by a quantized linear with as many groups."""
    for linear in linears.values():
        if linear.order is None or linear.owns_order:
            continue
        owner = linears.get(linear.order.removesuffix(".order"))
        if owner is None or not owner.owns_order or len(owner.widths) != len(linear.widths):
            raise _refusal(
                f"linears.{linear.name}", f"has order {linear.order!r}, which no such linear owns"
            )


def _refusal(key: str, problem: str) -> FormatError:
    return FormatError(f"quantization_config: {key} {problem}", param=f"quantization_config.{key}")
