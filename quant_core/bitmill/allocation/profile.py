"""The sensitivity profile: what every width costs every group, made once per model and text.

    cost[g, b] = predicted increase of the model's loss (mean nats per token) when group g of a
                 linear has width b and everything else keeps the source precision

Costs add up over groups and linears (`predicted_loss`), so one profile answers any budget. A
profile may also hold the column orders that the groups were formed in and, for `sba`, the salience
order and the output KL of every p. It is torch-free: the API process reads it too.

Stored as one .npz file of flat arrays (no pickles) beside a JSON header with `schema_version`;
the same profile gives the same bytes, whose SHA-256 is its `digest`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from bitmill.config.bit_width_map import LEGAL_WIDTHS, BitWidthMap, LinearShape
from bitmill.config.closed import Closed
from bitmill.errors import FormatError, reason
from bitmill.io import atomic as storage

SCHEMA_VERSION = 1
PROFILE_NAME = "profile.npz"
_HEADER_KEYS = {
    "schema_version",
    "model_digest",
    "calibration_digest",
    "settings",
    "widths",
    "linears",
    "orders",
    "sba",
}

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int32]


class ProfileConfig(Closed):
    """How a profile was measured, and where: a part of its id, stored in its header.

    kind: see `sensitivity/measure.py`. widths: of kind "knapsack"; base: the width that "sba"
    departs from. keep: patterns of linears that stay in the source precision; embeddings: matrices
    that are quantized too. code: of groups, where it is not affine. sequences: windows, where not
    all of the calibration's were taken. moments: how the costs of kind "knapsack" weigh tokens;
    None in profiles from before they did. outliers: numbers of outlier columns whose costs were
    measured too. What else is None was not recorded.
    """

    kind: Literal["knapsack", "sba", "orders"] | None = None
    order: Literal["natural", "activation"] | None = None
    keep: tuple[str, ...] | None = None
    embeddings: tuple[str, ...] | None = None
    widths: tuple[int, ...] | None = None
    code: str | None = None
    moments: Literal["weighted"] | None = None
    outliers: tuple[int, ...] | None = None
    base: int | None = None
    sequences: int | None = None
    dtype: str | None = None
    seed: int | None = None
    threads: int | None = None
    device: str | None = None
    devices: int | None = None
    torch: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What is stored and hashed."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def parse(cls, stored: object) -> ProfileConfig:
        """Raises `FormatError` naming the key that this version does not know."""
        try:
            return cls.model_validate(stored)
        except ValidationError as error:
            raise FormatError(
                f"profile setting {reason(error)}; this version of bitmill cannot use the "
                "profile: make it again"
            ) from error


def is_of_profiles(name: str) -> bool:
    """Whether a folder of profiles has entries of this name: an id, or what is being fetched."""
    return bool(re.fullmatch(r"[0-9a-f]{64}", name)) or name.startswith(".tmp-")


@dataclass(frozen=True)
class ProfileOrigin:
    """What a profile is made from; `key` identifies it."""

    config: ProfileConfig
    model_digest: str = ""
    calibration_digest: str = ""

    @property
    def key(self) -> str:
        """Hex SHA-256, the profile's id. Equal keys, same measurement."""
        return storage.sha256_json(
            {
                "model": self.model_digest,
                "calibration": self.calibration_digest,
                "settings": self.config.to_json(),
                "schema_version": SCHEMA_VERSION,
            }
        )


@dataclass(frozen=True)
class LinearProfile:
    """One linear of N rows and K columns.

    costs: float64 [G, B], nats per token, columns in the order of the profile's widths; [G, 0]
    where only orders or SBA records were made. order: name of the linear that owns the stored
    column order its groups were formed in, None for the natural order. kept: float64 [C, G, B], the
    costs with each of the profile's numbers of outlier columns; C is 0 where none were measured.
    """

    name: str
    rows: int
    columns: int
    costs: FloatArray
    order: str | None = None
    kept: FloatArray = field(default_factory=lambda: np.zeros((0, 0, 0)))

    @property
    def shape(self) -> LinearShape:
        """Name, N and K."""
        return LinearShape(self.name, self.rows, self.columns)

    def scaled(self, factor: float) -> LinearProfile:
        """The same with all costs times a factor."""
        return replace(self, costs=self.costs * factor, kept=self.kept * factor)


@dataclass(frozen=True)
class SbaRecord:
    """What SliM-LLM's allocation of one linear needs (arXiv 2405.14917, section 3.2).

    salience: int32 [G_full], the full groups from least to most salient (never the tail).
    kl: float64 [P], output KL where the p least salient groups have one bit less and the p most
    salient one bit more than the base width, p = 0..P-1.
    """

    salience: IndexArray
    kl: FloatArray


@dataclass(frozen=True)
class SensitivityProfile:
    """Costs of all linears, in the model's order. Frozen; arrays are not to be written to.

    widths: the candidate widths, ascending. orders: owner's name -> int32 [K], packed column k is
    input column order[k]. sba: base width -> linear's name -> record. outliers: numbers of outlier
    columns, ascending, that costs were measured with besides none.
    origin: what it was made from, no part of what was measured.
    """

    origin: ProfileOrigin = field(compare=False)
    widths: tuple[int, ...]
    linears: tuple[LinearProfile, ...]
    orders: Mapping[str, IndexArray] = field(default_factory=dict)
    sba: Mapping[int, Mapping[str, SbaRecord]] = field(default_factory=dict)
    outliers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if tuple(sorted(set(self.widths))) != self.widths or not set(self.widths) <= set(
            LEGAL_WIDTHS
        ):
            raise FormatError(
                f"profile widths {list(self.widths)} must ascend and be among {list(LEGAL_WIDTHS)}"
            )
        names = [linear.name for linear in self.linears]
        if len(set(names)) != len(names):
            raise FormatError("a linear stands twice in the profile")
        for linear in self.linears:
            self._check_linear(linear)
        for base, records in self.sba.items():
            for name, record in records.items():
                _check_record(base, self.linear(name), record)

    def _check_linear(self, linear: LinearProfile) -> None:
        expected = (linear.shape.groups, len(self.widths))
        if linear.costs.shape != expected or linear.costs.dtype != np.float64:
            raise FormatError(
                f"costs of {linear.name} are {linear.costs.dtype} {linear.costs.shape}; "
                f"expected float64 {expected}"
            )
        if not np.isfinite(linear.costs).all() or (linear.costs < 0).any():
            raise FormatError(f"costs of {linear.name} must be finite and not negative")
        kept = linear.kept
        if len(kept) and (kept.shape != (len(self.outliers), *expected) or not (kept >= 0).all()):
            raise FormatError(
                f"costs of {linear.name} with outliers are {kept.shape}; expected "
                f"{(len(self.outliers), *expected)}, none of them negative"
            )
        if linear.order is None:
            return
        order = self.orders.get(linear.order)
        if order is None or order.dtype != np.int32:
            raise FormatError(f"{linear.name} names the order of {linear.order}, which is missing")
        if not np.array_equal(np.sort(order), np.arange(linear.columns)):
            raise FormatError(
                f"the order of {linear.order} is no permutation of the {linear.columns} "
                f"columns of {linear.name}"
            )

    def of(self, origin: ProfileOrigin) -> SensitivityProfile:
        """The same measurement, said to be made from something else that gives it too."""
        return replace(self, origin=origin)

    def scaled(self, factor: float) -> SensitivityProfile:
        """The same with all costs times a factor."""
        if factor == 1:
            return self
        return replace(self, linears=tuple(linear.scaled(factor) for linear in self.linears))

    def keeping(self, outliers: Mapping[str, int]) -> SensitivityProfile:
        """The profile of the model whose linears keep so many outlier columns, none where they are
        not named. Raises `FormatError` for a number that was not measured."""
        if not outliers:
            return self
        place = {count: i for i, count in enumerate(self.outliers)}
        linears = []
        for linear in self.linears:
            count = outliers.get(linear.name, 0)
            if count and (count not in place or not len(linear.kept)):
                raise FormatError(
                    f"{linear.name}: {count} outlier columns were not measured; the profile has "
                    f"{list(self.outliers)}"
                )
            kept = linear.kept[place[count]] if count else linear.costs
            linears.append(replace(linear, costs=kept))
        return replace(self, linears=tuple(linears))

    def predicted(self, bit_widths: BitWidthMap) -> float:
        """Predicted increase of the loss, nats per token, of a map; raises as `predicted_loss`."""
        return self.keeping(bit_widths.outliers).predicted_loss(bit_widths.linears)

    def linear(self, name: str) -> LinearProfile:
        """The profile of one linear; raises `FormatError` where it has none."""
        if "_index" not in self.__dict__:
            index = {linear.name: linear for linear in self.linears}
            object.__setattr__(self, "_index", index)
        found: LinearProfile | None = self.__dict__["_index"].get(name)
        if found is None:
            raise FormatError(
                f"the profile has no linear {name!r}: it was made for another model or settings"
            )
        return found

    def check_shapes(self, shapes: Iterable[LinearShape]) -> None:
        """Raise `FormatError` unless every one of these linears is in the profile, same shape."""
        for shape in shapes:
            found = self.linear(shape.name)
            if (found.rows, found.columns) != (shape.rows, shape.columns):
                raise FormatError(
                    f"{shape.name} is {shape.rows} x {shape.columns} in the model but "
                    f"{found.rows} x {found.columns} in the profile"
                )

    def predicted_loss(self, linears: Mapping[str, Sequence[int]]) -> float:
        """Predicted increase of the loss, nats per token, of these widths per group.

        Raises `FormatError` for a width or a linear that was not measured.
        """
        column = {width: i for i, width in enumerate(self.widths)}
        total = 0.0
        for name, widths in linears.items():
            costs = self.linear(name).costs
            unknown = sorted(set(widths) - set(column))
            if unknown:
                raise FormatError(
                    f"{name}: widths {unknown} were not measured; the profile has "
                    f"{list(self.widths)}"
                )
            if len(widths) != len(costs):
                raise FormatError(f"{name}: {len(widths)} widths for {len(costs)} groups")
            chosen = np.fromiter((column[w] for w in widths), dtype=np.int64, count=len(widths))
            total += float(costs[np.arange(len(costs)), chosen].sum())
        return total

    @property
    def key(self) -> str:
        """Hex SHA-256 of what the profile was made from, its id in the service."""
        return self.origin.key

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the stored bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The stored file; the same profile gives the same bytes."""
        header, arrays = _flatten(self)
        text = json.dumps(header, separators=(",", ":"), sort_keys=True, allow_nan=False)
        buffer = io.BytesIO()
        named: dict[str, Any] = {"header": np.frombuffer(text.encode(), dtype=np.uint8)}
        np.savez(buffer, **(named | arrays))
        return buffer.getvalue()

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        storage.write_bytes(path, self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = PROFILE_NAME) -> SensitivityProfile:
        """Read a stored profile; raises `FormatError` for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                header = json.loads(arrays["header"].tobytes())
                return _unflatten(header, {key: arrays[key] for key in _ARRAYS})
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise FormatError(f"{name} is not a sensitivity profile: {error}") from error

    @classmethod
    def load(cls, path: Path) -> SensitivityProfile:
        """Read a profile file, or the `profile.npz` of a folder."""
        target = path / PROFILE_NAME if path.is_dir() else path
        try:
            data = target.read_bytes()
        except OSError as error:
            raise FormatError(f"{target.name} cannot be read: {reason(error)}") from error
        return cls.from_bytes(data, name=target.name)


_ARRAYS = ("costs", "orders", "salience", "kl")


def _check_record(base: int, linear: LinearProfile, record: SbaRecord) -> None:
    full = linear.columns // 128
    if not np.array_equal(np.sort(record.salience), np.arange(full)):
        raise FormatError(
            f"salience of {linear.name} at base width {base} must order its {full} full groups"
        )
    if not 1 <= len(record.kl) <= full // 2 + 1 or not np.isfinite(record.kl).all():
        raise FormatError(
            f"{linear.name} at base width {base} has {len(record.kl)} KL values; "
            f"expected 1 to {full // 2 + 1} finite ones"
        )


def _flatten(
    profile: SensitivityProfile,
) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.generic]]]:
    """Header and flat arrays; lists in the header say how to cut the arrays."""
    records = [
        (base, name, profile.sba[base][name])
        for base in sorted(profile.sba)
        for name in sorted(profile.sba[base])
    ]
    owners = sorted(profile.orders)
    header = {
        "schema_version": SCHEMA_VERSION,
        "model_digest": profile.origin.model_digest,
        "calibration_digest": profile.origin.calibration_digest,
        "settings": profile.origin.config.to_json(),
        "widths": list(profile.widths),
        "linears": [[p.name, p.rows, p.columns, p.order] for p in profile.linears],
        "orders": [[owner, len(profile.orders[owner])] for owner in owners],
        "sba": [[base, name, len(r.salience), len(r.kl)] for base, name, r in records],
    }
    if profile.outliers:
        header["outliers"] = list(profile.outliers)
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "costs": _concat(
            [part.ravel() for p in profile.linears for part in (p.costs, p.kept)], np.float64
        ),
        "orders": _concat([profile.orders[owner] for owner in owners], np.int32),
        "salience": _concat([r.salience for _, _, r in records], np.int32),
        "kl": _concat([r.kl for _, _, r in records], np.float64),
    }
    return header, arrays


def _concat(parts: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    joined: npt.NDArray[Any] = np.concatenate([np.zeros(0, dtype=dtype), *parts])
    return joined.astype(dtype)


def _unflatten(header: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> SensitivityProfile:
    if not isinstance(header, dict) or header.get("schema_version") != SCHEMA_VERSION:
        version = header.get("schema_version") if isinstance(header, dict) else None
        raise FormatError(
            f"profile has schema_version {version!r}; this version of bitmill reads "
            f"{SCHEMA_VERSION}: make the profile again"
        )
    odd = sorted((set(header) - {"outliers"}) ^ _HEADER_KEYS)
    if odd:
        raise FormatError(f"profile header has missing or unknown keys: {odd}")
    widths, outliers = tuple(header["widths"]), tuple(header.get("outliers", ()))
    embeddings = set(header["settings"].get("embeddings", ()))
    linears = []
    costs = _Cutter(arrays["costs"])
    for name, rows, columns, order in header["linears"]:
        groups = LinearShape(name, rows, columns).groups
        table = costs.take(groups * len(widths)).reshape(groups, len(widths))
        shape = (0 if name in embeddings else len(outliers), groups, len(widths))
        kept = costs.take(math.prod(shape)).reshape(shape)
        linears.append(LinearProfile(name, rows, columns, table, order, kept))
    orders = _Cutter(arrays["orders"])
    salience, kl = _Cutter(arrays["salience"]), _Cutter(arrays["kl"])
    sba: dict[int, dict[str, SbaRecord]] = {}
    for base, name, groups, points in header["sba"]:
        record = SbaRecord(salience.take(groups), kl.take(points))
        sba.setdefault(base, {})[name] = record
    return SensitivityProfile(
        origin=ProfileOrigin(
            ProfileConfig.parse(header["settings"]),
            header["model_digest"],
            header["calibration_digest"],
        ),
        widths=widths,
        linears=tuple(linears),
        orders={owner: orders.take(length) for owner, length in header["orders"]},
        sba=sba,
        outliers=outliers,
    )


class _Cutter:
    """Takes consecutive pieces of a flat array."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array
        self._at = 0

    def take(self, count: int) -> npt.NDArray[Any]:
        piece = self._array[self._at : self._at + count]
        if len(piece) != count:
            raise FormatError("profile arrays are shorter than the header says")
        self._at += count
        return piece
