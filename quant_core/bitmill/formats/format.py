"""Formats by name: which tensors a checkpoint has, what it takes, what it refuses. Torch-free.

A format's configuration class says, before anything is written, every tensor with its bytes, and
what it cannot hold; budgets and plans ask it. What writes and reads the files is its codec
(`formats/codec.py`), which is found by its place. Nothing outside a format's own folder asks for
its name: a plan says in which format its model will be stored. docs/extending.md shows how to add
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from bitmill.config.bit_width_map import (
    WIDTHS,
    BitWidthMap,
    LinearShape,
    group_bytes,
    group_columns,
)
from bitmill.config.closed import Closed
from bitmill.config.transforms import transform_of
from bitmill.errors import SpecError, first_problem
from bitmill.formats.loading import Runtime
from bitmill.io.safetensors import TensorInfo, checkpoint_bytes
from bitmill.plan.architectures import architecture
from bitmill.plan.model_plan import Plan, PlannedLinear
from bitmill.registry import Registry

_LONGEST_VALUE = 100
Order = Literal["natural", "activation"]
Widths = Mapping[str, Sequence[int]]
Outliers = Mapping[str, int]
"""Number of outlier columns of the linears that have some."""


@dataclass(frozen=True)
class Contents:
    """What is to be stored: a planned model, a width for every group of its linears, and the column
    order that the groups were formed in. config: the model's config.json, where it is known.
    outliers: columns that are kept in 16 bits, of the linears that have some."""

    plan: Plan
    widths: Widths
    order: Order = "natural"
    config: Mapping[str, Any] = field(default_factory=dict)
    outliers: Outliers = field(default_factory=dict)

    @classmethod
    def of(
        cls, plan: Plan, bit_widths: BitWidthMap, config: Mapping[str, Any] | None = None
    ) -> Contents:
        """A planned model with this map."""
        return cls(plan, bit_widths.linears, bit_widths.order, config or {}, bit_widths.outliers)

    @property
    def bit_widths(self) -> BitWidthMap:
        """Widths, order and outliers as a map."""
        widths = {name: tuple(groups) for name, groups in self.widths.items()}
        return BitWidthMap(order=self.order, linears=widths, outliers=dict(self.outliers))


@dataclass(frozen=True)
class Facts:
    """What decides whether a format can hold a model; known before there is a map.

    kinds: of the linears' quantized tensors (`quant.tensors.KINDS`); packed embeddings and heads
    are "affine" beside any. widths: that groups may have; mixed:
    whether those of one linear may differ. rewrites: names of those that are left to be stored.
    config: the model's config.json, empty where it is not known yet. grid: that all codes will
    be on (`MethodConfig.grid`), "any", or None where codes tell themselves.
    """

    plan: Plan
    kinds: frozenset[str]
    widths: frozenset[int]
    mixed: bool
    rewrites: frozenset[str]
    config: Mapping[str, Any]
    grid: str | None = None

    @classmethod
    def of(
        cls,
        contents: Contents,
        config: Mapping[str, Any],
        kinds: frozenset[str],
        rewrites: frozenset[str],
    ) -> Facts:
        """Those of a model whose map is known."""
        return cls(
            contents.plan,
            kinds,
            frozenset(width for widths in contents.widths.values() for width in widths),
            any(len(set(widths)) > 1 for widths in contents.widths.values()),
            rewrites,
            config,
        )


@dataclass(frozen=True)
class Refusal:
    """Why a format cannot hold a model. name: of the setting, linear or tensor at fault."""

    name: str
    reason: str


class Format(Closed):
    """Base of the settings of all formats, and what must be known of each without torch.

    name: as users write it. codec: place of the `Codec` that is made from the settings. headers:
    place of what reads a folder's headers without torch (`formats/headers.py`), which exports of
    jobs are planned by. keeps_codes: whether the quantized tensors themselves can be read back, so
    that a job can store its result in it. kinds, widths, mixed, rewrites: what it has a place for,
    as in `Facts`; None for anything. library: what reads it, as the Hub calls it. runtimes: those
    that read it, and how they load a folder (`formats/loading.py`).
    """

    name: ClassVar[str]
    codec: ClassVar[str]
    headers: ClassVar[str | None] = None
    keeps_codes: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str] | None] = frozenset({"affine"})
    widths: ClassVar[frozenset[int] | None] = frozenset(WIDTHS)
    mixed: ClassVar[bool] = True
    rewrites: ClassVar[frozenset[str] | None] = frozenset()
    library: ClassVar[str] = "transformers"
    runtimes: ClassVar[tuple[Runtime, ...]] = ()

    @classmethod
    def loading(cls, settings: Mapping[str, Any]) -> tuple[Runtime, ...]:
        """Those of `runtimes` that load a folder with this config.json."""
        return cls.runtimes

    def readers(self, facts: Facts) -> tuple[Runtime, ...]:
        """Those of `runtimes` that will read a model of which this is known, whatever its map."""
        return self.runtimes

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a folder with this config.json is in the format."""
        return False

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Everything of the model that the format has no place for."""
        found = [
            Refusal(kind, f"it has no place for tensors of kind {kind!r}")
            for kind in sorted(_beyond(facts.kinds, self.kinds))
        ]
        if self.widths is not None and facts.widths - self.widths:
            found.append(
                Refusal(
                    "allocation.widths",
                    f"it has no widths {sorted(facts.widths - self.widths)}: allow only some of "
                    f"{sorted(self.widths)}",
                )
            )
        if facts.mixed and not self.mixed:
            found.append(
                Refusal(
                    "allocation.per_linear",
                    "all groups of a linear have one width in it: set allocation.per_linear",
                )
            )
        for name in sorted(_beyond(facts.rewrites, self.rewrites)):
            found.append(_no_rewrite(name))
        return found

    def takes(self, width: int) -> bool:
        """Whether groups of this width can be stored."""
        return self.widths is None or width in self.widths

    def tensors(self, contents: Contents) -> list[TensorInfo]:
        """Every stored tensor with its dtype, shape and bytes, in the order in which it is filed.

        Raises `FormatError` unless there is one legal width per group of every linear.
        """
        raise NotImplementedError

    def file_bytes(self, contents: Contents) -> int:
        """Bytes of all files that hold tensors, headers included."""
        return checkpoint_bytes(self.tensors(contents))

    def group_bytes(self, width: int, rows: int, columns: int) -> int:
        """Stored bytes of one group of `columns` <= 128 columns: codes, and the grid they are in.

        The sum over all groups and `fixed_bytes` is what a budget in `bits` counts.
        """
        return group_bytes(width, rows, columns)

    def embedding_group_bytes(self, width: int, rows: int, columns: int) -> int:
        """The same of a group of a packed embedding or head."""
        return self.group_bytes(width, rows, columns)

    def linear_bytes(
        self, shape: LinearShape, widths: Sequence[int], *, embedding: bool = False
    ) -> int:
        """Stored bytes of one linear's groups, or of those of an embedding or head."""
        of_group = self.embedding_group_bytes if embedding else self.group_bytes
        return sum(
            of_group(width, shape.rows, columns)
            for width, columns in zip(widths, group_columns(shape.columns), strict=True)
        )

    def fixed_bytes(self, plan: Plan, order: Order) -> int:
        """Bytes beside the groups that no width changes: 4 per column of every stored order, and
        what other rewrites store of each linear."""
        owners = set(order_owners(plan, order).values())
        orders = sum(4 * linear.columns for linear in plan.linears if linear.name in owners)
        others = (tensor.nbytes for one in plan.linears for tensor in rewrite_tensors(plan, one))
        return orders + sum(others)


def _beyond(found: frozenset[str], known: frozenset[str] | None) -> frozenset[str]:
    return frozenset() if known is None else found - known


def packed_embeddings(facts: Facts) -> list[Refusal]:
    """Of a format that has no place for them."""
    why = "it has no packed embeddings: quantize with allocation.embeddings 'keep'"
    return [Refusal(matrix.name, why) for matrix in facts.plan.embeddings]


def transposed(facts: Facts) -> list[Refusal]:
    """Of a format whose runtimes know no weights that lie as [K, N]."""
    kind = facts.plan.model_type
    if not architecture(kind).transposed:
        return []
    return [Refusal(kind, "its runtimes know no transposed linears")]


def _no_rewrite(name: str) -> Refusal:
    if name == "order":
        return Refusal(
            "allocation.order",
            "it has no place for column orders: quantize with allocation.order 'natural'",
        )
    if name == "outliers":
        return Refusal(
            "allocation.outliers",
            "it has no place for columns in 16 bits: quantize without allocation.outliers",
        )
    return Refusal(name, f"it has no place for what the transform {name!r} leaves to be stored")


FORMATS: Registry[type[Format]] = Registry(
    "format",
    "bitmill.formats",
    {
        "bitmill-1": "bitmill.formats.packed.format:Packed",
        "bitmill-2": "bitmill.formats.packed.format:PackedTrellis",
        "compressed-tensors": "bitmill.formats.compressed_tensors.format:CompressedTensors",
        "dequantized": "bitmill.formats.dequantized.format:Dequantized",
        "exl2": "bitmill.formats.exl2.format:Exl2",
        "gguf": "bitmill.formats.gguf.format:Gguf",
        "gptq": "bitmill.formats.gptq.format:GPTQCheckpoint",
        "mlx": "bitmill.formats.mlx.format:Mlx",
        "w8a8": "bitmill.formats.w8a8.format:W8A8",
    },
)


def parse_format(name: str, settings: Mapping[str, Any]) -> Format:
    """The format of this name with these settings, as anybody may have written them.

    Raises `SpecError` for an unknown name (`unknown_name`), and for a setting that the format does
    not have or take, with its value and the settings that there are.
    """
    kind = FORMATS[name]
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        wrong = str(first["loc"][0]) if first["loc"] else ", ".join(settings)
        raise SpecError(_misfit(kind, name, wrong, settings, error), param=wrong) from error


def _misfit(
    kind: type[Format], name: str, wrong: str, settings: Mapping[str, Any], error: ValidationError
) -> str:
    value = repr(settings.get(wrong))[:_LONGEST_VALUE]
    known = ", ".join(
        f"{key} (default {field.default!r})" for key, field in kind.model_fields.items()
    )
    if not known:
        return f"format {name!r} takes no settings, but {wrong} = {value} is given: leave it out"
    if wrong not in kind.model_fields and wrong in settings:
        return f"format {name!r} has no setting {wrong!r}, given as {value}: it has {known}"
    _, problem = first_problem(error)
    return f"setting {wrong!r} of format {name!r} cannot be {value}: {problem}; it has {known}"


def format_of(plan: Plan) -> Format:
    """The format in which a planned model will be stored."""
    return _with_defaults(plan.format)


@lru_cache(maxsize=16)
def _with_defaults(name: str) -> Format:
    """Budgets ask for every group."""
    return FORMATS[name]()


def order_owners(plan: Plan, order: Order) -> dict[str, str]:
    """Linear -> the linear whose `.order` tensor holds its column order; empty for `natural`.

    The first linear that reads an input owns the order of that input's columns. An order that is
    folded into the rows of the linears before it is stored nowhere.
    """
    if order == "natural":
        return {}
    return {
        name: first
        for block in range(plan.block_count)
        for first, *others in plan.siblings(block)
        if first not in plan.feeders
        for name in (first, *others)
    }


def rewrite_tensors(plan: Plan, linear: PlannedLinear) -> list[TensorInfo]:
    """What the rewrites of a linear store beside its column order, by the names in files."""
    return [
        replace(tensor, name=f"{linear.name}.{tensor.name}")
        for asked in plan.transforms
        for tensor in transform_of(asked).stored(linear.shape)
    ]


def stored_rewrites(plan: Plan, order: Order) -> frozenset[str]:
    """Names of the rewrites that a reader has to know of."""
    found = {"order"} if order_owners(plan, order) else set()
    asked = [transform_of(one) for one in plan.transforms]
    found |= {
        one.name for one in asked if one.online or any(one.stored(shape) for shape in plan.shapes)
    }
    return frozenset(found)


def check_supported(chosen: Format, facts: Facts) -> None:
    """Raise `SpecError` (format_refuses) naming all that the format has no place for."""
    found = chosen.refusals(facts)
    if found:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in found)
        raise SpecError(
            f"format {chosen.name!r} cannot hold this model: {reasons}",
            code="format_refuses",
            param=found[0].name,
        )
