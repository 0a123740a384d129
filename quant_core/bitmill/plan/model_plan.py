"""What a job will work on, from config and headers alone, before any weight loads. Torch-free.

A plan lists every linear that will be quantized with where its [N, K] weight lies in the source,
every other tensor that the packed checkpoint keeps as it is, and which linears read the same input.
Where the job quantizes them, input embedding and output head are listed apart, as matrices [V, D]
that are packed like linears; a tied head is the embedding.
Names are those of transformers' module tree; a source whose names differ, or that fuses experts, is
described by each entry's `source` (`plan/source_tensors.py`).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bitmill.config.bit_width_map import BitWidthMap, LinearShape
from bitmill.config.closed import Closed
from bitmill.config.quantization import (
    DEFAULT_FORMAT,
    Allocation,
    BaseAllocation,
    Budget,
    QuantizationConfig,
)
from bitmill.config.transforms import TransformConfig
from bitmill.errors import FormatError, ModelError, SpecError
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.architectures import (
    ELEMENTWISE,
    ROUTERS,
    Architecture,
    sibling_key,
    step_of,
)
from bitmill.plan.attention_cache import CacheLayer, cache_layers
from bitmill.plan.config_json import size_of
from bitmill.plan.parameters import HEAD_WEIGHT
from bitmill.plan.source_model import SourceModel, read_source, rewritten_source
from bitmill.plan.source_tensors import Placed, SourceTensors, place_tensors

PLAN_NAME = "plan.json"
NARROWED_FROM = 1 << 20
"""Values from which on a kept float32 matrix is narrowed; smaller ones weigh next to nothing."""
POSITION_TABLES = ("embed_positions.weight", "wpe.weight")


class Source(Closed):
    """Where a matrix lies in the source: a stored tensor, or rows of one expert's part of it.

    index: place on the first axis of a fused tensor [E, rows, K]; rows: [begin, end) of its rows.
    transposed: the tensor is stored [K, N].
    """

    tensor: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


class PlannedLinear(Closed):
    """A linear that will be quantized; `name` is its module's full name, N rows, K columns.

    block: its decoder block, -1 for an embedding or head.
    """

    name: str
    block: int
    rows: int
    columns: int
    dtype: str
    source: Source

    @property
    def shape(self) -> LinearShape:
        """Name, N and K, as `bitmill.config.bit_width_map` counts them."""
        return LinearShape(self.name, self.rows, self.columns)

    @property
    def embedding(self) -> bool:
        """Whether it is an embedding or head."""
        return self.block < 0

    @property
    def routed(self) -> bool:
        """Whether it belongs to an expert, which sees only the tokens that are sent to it."""
        return ".experts." in self.name


class PlannedTensor(Closed):
    """A tensor that the packed checkpoint keeps: biases, norms, embeddings, linears kept whole.

    name: its name there (the source's own, with a missing base prefix put back); module: its name
    in transformers' module tree, which differs for a few older formats. dtype: in the source;
    narrowed: whether it is packed in float16 instead.
    """

    name: str
    module: str
    dtype: str
    shape: tuple[int, ...]
    source: Source
    narrowed: bool = False

    @cached_property
    def spec(self) -> TensorInfo:
        """Name, dtype and shape in the checkpoint, as `bitmill.io.safetensors` counts them."""
        return TensorInfo(self.name, "F16" if self.narrowed else self.dtype, self.shape)


class LeftOut(Closed):
    """A stored tensor that the packed checkpoint lacks, because the language model has no use for
    it; what: the kind of tensors it belongs to, in the plural."""

    name: str
    what: str
    nbytes: int


class Plan(Closed):
    """Everything later stages need to know about the model; see the module's text.

    linears: of the decoder blocks, in execution order. embeddings: input embedding and head, where
    they are quantized too. max_positions: None where the model has no limit.
    experts: routed experts of a block, 0 in a dense model. left_out: they take no budget.
    format: in which the result is stored, by its name in `bitmill.formats.format.FORMATS`.
    transforms: {"name": ..., settings} of those that rewrite linears beside column orders.
    folds: whether column orders may be folded into the rows of linears before.
    cache: what each block caches of a token; empty in plans from before it was counted.
    """

    schema_version: Literal[1] = 1
    model_type: str
    block_prefix: str
    block_count: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    experts: int
    linears: tuple[PlannedLinear, ...]
    tensors: tuple[PlannedTensor, ...]
    embeddings: tuple[PlannedLinear, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    cache: tuple[CacheLayer, ...] = ()
    format: str = DEFAULT_FORMAT
    transforms: tuple[dict[str, Any], ...] = ()
    folds: bool = True

    def stored_as(
        self, name: str, transforms: Iterable[TransformConfig], *, folds: bool = True
    ) -> Plan:
        """The same plan with another format and other transforms."""
        found = tuple({"name": one.name} | one.model_dump(mode="json") for one in transforms)
        return self.model_copy(update={"format": name, "transforms": found, "folds": folds})

    @cached_property
    def notes(self) -> list[str]:
        """One sentence for each kind of tensors that is left out."""
        kinds: dict[str, list[LeftOut]] = {}
        for tensor in self.left_out:
            kinds.setdefault(tensor.what, []).append(tensor)
        return [
            f"left out {len(tensors)} tensors of the source ({sum(t.nbytes for t in tensors):,} "
            f"bytes), {what}: {', '.join(t.name for t in tensors[:3])}"
            f"{', ...' if len(tensors) > 3 else ''}"
            for what, tensors in kinds.items()
        ]

    @property
    def stored(self) -> list[str]:
        """Every tensor of the source that the job needs, each once, in the order of the plan."""
        sources = [linear.source for linear in self.matrices] + [t.source for t in self.tensors]
        return list(dict.fromkeys(source.tensor for source in sources))

    @cached_property
    def matrices(self) -> tuple[PlannedLinear, ...]:
        """Everything that is quantized: linears, then embeddings."""
        return self.linears + self.embeddings

    @cached_property
    def shapes(self) -> tuple[LinearShape, ...]:
        """Name, N and K of everything that is quantized, in order."""
        return tuple(linear.shape for linear in self.matrices)

    @cached_property
    def by_name(self) -> dict[str, PlannedLinear]:
        """Linears and embeddings by full name."""
        return {linear.name: linear for linear in self.matrices}

    @cached_property
    def weights(self) -> int:
        """sum(N * K) over everything that is quantized."""
        return sum(shape.weights for shape in self.shapes)

    @cached_property
    def _by_block(self) -> list[list[PlannedLinear]]:
        blocks: list[list[PlannedLinear]] = [[] for _ in range(self.block_count)]
        for linear in self.linears:
            blocks[linear.block].append(linear)
        return blocks

    @cached_property
    def feeders(self) -> dict[str, tuple[str, ...]]:
        """Linear -> the linears whose outputs, element by element, become its inputs.

        Its column order can be folded into their rows, which is exact: all of them are quantized,
        have as many rows as it has columns, and no bias.
        """
        if not self.folds:
            return {}
        kept = {sibling_key(tensor.module.rpartition(".")[0]) for tensor in self.tensors}
        found: dict[tuple[int, str], list[PlannedLinear]] = {}
        for linear in self.linears:
            found.setdefault(sibling_key(linear.name), []).append(linear)
        feeders = {}
        for (step, parent), (linear, *others) in found.items():
            source = (ELEMENTWISE.get(step, -1), parent)
            rows = {feeder.rows for feeder in found.get(source, ())}
            if not others and rows == {linear.columns} and source not in kept:
                feeders[linear.name] = tuple(feeder.name for feeder in found[source])
        return feeders

    @cached_property
    def position_limit(self) -> int | None:
        """Longest window the model can run at all: its table of positions; None without one."""
        learned = any(t.name.endswith(POSITION_TABLES) for t in self.tensors)
        return self.max_positions if learned else None

    def check_length(self, length: int, param: str) -> None:
        """Raise `SpecError` naming `param` where windows of `length` tokens cannot be run."""
        if self.position_limit is not None and length > self.position_limit:
            raise SpecError(
                f"{param} is {length}; the model has {self.position_limit} positions: give at "
                "most that",
                code="length_exceeds_model",
                param=param,
            )

    @cached_property
    def _siblings(self) -> list[list[list[str]]]:
        steps = map(self.input_steps, range(self.block_count))
        return [[siblings for step in block for siblings in step] for block in steps]

    def block_linears(self, block: int) -> list[PlannedLinear]:
        """Linears of one block, in execution order."""
        return self._by_block[block]

    def input_steps(self, block: int) -> list[list[list[str]]]:
        """Full names of a block's linears: steps in execution order, each a list of siblings.

        Siblings read the same input; those of a step can be captured in one pass: one list per step
        in a dense block, one per expert in the experts' steps.
        """
        steps: dict[tuple[int, str], dict[tuple[int, str], list[str]]] = {}
        for linear in self.block_linears(block):
            step, key = step_of(linear.name)[0], sibling_key(linear.name)
            own = linear.name if key[1] == linear.name else ""
            steps.setdefault((step, own), {}).setdefault(key, []).append(linear.name)
        return [list(groups.values()) for groups in steps.values()]

    def siblings(self, block: int) -> list[list[str]]:
        """Full names that read the same input, in execution order: [[q, k, v], [o], ...]."""
        return self._siblings[block]


def _source(place: Placed, transposed: bool = False) -> Source:
    return Source(
        tensor=place.stored.name, index=place.index, rows=place.rows, transposed=transposed
    )


def _matrix(place: Placed, found: Architecture) -> PlannedLinear | None:
    """The linear of a block, embedding or head that a parameter is the weight of, if it is one."""
    path, _, leaf = place.module.rpartition(".")
    inside = place.module.removeprefix(f"{found.blocks}.")
    if leaf != "weight" or len(place.shape) != 2 or path.rpartition(".")[2] in ROUTERS:
        return None
    if inside == place.module and place.module not in (found.embedding, HEAD_WEIGHT):
        return None
    block = int(inside.partition(".")[0]) if inside != place.module else -1
    transposed = found.transposed and block >= 0
    rows, columns = reversed(place.shape) if transposed else place.shape
    return PlannedLinear(
        name=path,
        block=block,
        rows=rows,
        columns=columns,
        dtype=place.stored.dtype,
        source=_source(place, transposed),
    )


def _check_embeddings(source: SourceTensors, found: Architecture) -> None:
    """Refuse a model whose tied matrix is stored under the head's name alone."""
    if found.embedding not in source.placed:
        raise ModelError(
            "the source stores no input embedding (a tied one lies under the head's name), so it "
            "cannot be quantized: set allocation.embeddings to 'keep', and leave 'embeddings' out "
            "of evaluation.baselines",
            code="no_embedding",
            param="allocation.embeddings",
        )


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def _order(linear: PlannedLinear) -> tuple[Any, ...]:
    """Execution order: block, step, expert or parent, place among the siblings."""
    step, place = step_of(linear.name)
    parent = linear.name.rpartition(".")[0]
    numbers = tuple(int(part) for part in parent.split(".") if part.isdecimal())
    return linear.block, step, numbers, parent, place, linear.name


def _kept(place: Placed, allocation: BaseAllocation) -> PlannedTensor:
    router = place.module.removesuffix(".weight").rpartition(".")[2] in ROUTERS
    matrix = len(place.shape) > 1 and math.prod(place.shape) >= NARROWED_FROM and not router
    wide = place.stored.dtype in ("F32", "F64") and matrix
    return PlannedTensor(
        name=place.name,
        module=place.module,
        dtype=place.stored.dtype,
        shape=place.shape,
        source=_source(place),
        narrowed=wide and allocation.kept_dtype == "auto",
    )


def _check_matrices(linears: list[PlannedLinear]) -> None:
    for linear in linears:
        if not (0 < linear.rows <= 1 << 24 and 0 < linear.columns <= 1 << 24):
            raise ModelError(
                f"{linear.name} has the shape [{linear.rows}, {linear.columns}]; both sides must "
                f"be 1 to {1 << 24}",
                code="bad_shape",
            )


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def build_plan(
    config: dict[str, Any],
    found: Architecture,
    stored: Iterable[TensorInfo],
    allocation: BaseAllocation,
) -> Plan:
    """The plan of a model from its sanitized config and its tensors' headers."""
    quantize_embeddings = allocation.embeddings == "quantize"
    source = place_tensors(stored, found, found.parameters(config))
    linears: list[PlannedLinear] = []
    tensors: list[PlannedTensor] = []
    embeddings: list[PlannedLinear] = []
    for _, place in sorted(source.placed.items(), key=lambda item: _natural(item[0])):
        matrix = _matrix(place, found)
        if matrix is None or _matches(matrix.name, allocation.keep):
            tensors.append(_kept(place, allocation))
        elif matrix.block >= 0:
            linears.append(matrix)
        elif quantize_embeddings:
            embeddings.append(matrix)
        else:
            tensors.append(_kept(place, allocation))
    _check_matrices(linears + embeddings)
    if not linears and allocation.keep:
        raise SpecError(
            f"allocation.keep {list(allocation.keep)} leaves no linear to quantize: keep fewer",
            code="no_linears",
            param="allocation.keep",
        )
    if not linears:
        raise ModelError("the model has no linear to quantize", code="no_linears")
    if quantize_embeddings:
        _check_embeddings(source, found)
    return Plan(
        model_type=found.model_type,
        block_prefix=found.blocks,
        block_count=size_of(config, "num_hidden_layers") or 0,
        hidden_size=size_of(config, "hidden_size") or 0,
        vocab_size=size_of(config, "vocab_size") or 0,
        max_positions=size_of(config, "max_position_embeddings"),
        experts=size_of(config, "num_experts") or 0,
        linears=tuple(sorted(linears, key=_order)),
        tensors=tuple(tensors),
        embeddings=tuple(embeddings),
        left_out=tuple(
            LeftOut(name=tensor.name, what=what, nbytes=tensor.nbytes)
            for tensor, what in source.left_out
        ),
        cache=cache_layers(config, found),
    )


def check_lengths(plan: Plan, calibration: int, evaluation: int) -> None:
    """Raise `SpecError` where the model cannot run windows of so many tokens."""
    plan.check_length(calibration, "calibration.length")
    plan.check_length(evaluation, "evaluation.length")


def length_notes(plan: Plan, calibration: int, evaluation: int) -> list[str]:
    """What to say of windows that are longer than the model was trained for, but can be run."""
    asked = {"calibration.length": calibration, "evaluation.length": evaluation}
    return [
        f"{param} is {length}, the model was made for {plan.max_positions} positions: its outputs "
        "behind those are not what it was trained for"
        for param, length in asked.items()
        if plan.max_positions and plan.position_limit is None and length > plan.max_positions
    ]


def check_rows(plan: Plan, devices: int) -> None:
    """Raise `SpecError` where a linear has fewer output rows than devices that divide them."""
    for linear in plan.linears:
        if linear.rows < devices:
            raise SpecError(
                f"devices is {devices}, {linear.name} has {linear.rows} output rows to "
                "divide: give at most as many devices, or keep that linear",
                param="devices",
            )


def plan_source(source: SourceModel, asked: QuantizationConfig) -> Plan:
    """Plan a job for what was read, and rewritten where the job asks for that; raises `ModelError`
    for tensors that do not fit."""
    made = build_plan(source.settings, source.architecture, source.stored, asked.allocation)
    return made.stored_as(asked.format, asked.transforms, folds=asked.method.folds)


def make_plan(folder: Path, asked: QuantizationConfig, *, gguf: str | None = None) -> Plan:
    """Plan a job for a local model folder, or for one GGUF file in it; raises as both do."""
    source = read_source(folder, gguf=gguf)
    return plan_source(rewritten_source(source, asked.source_transforms), asked)


def plan_for_map(
    folder: Path,
    widths: BitWidthMap,
    asked: QuantizationConfig | None = None,
    *,
    gguf: str | None = None,
) -> tuple[Allocation, Plan]:
    """The allocation and the plan in which exactly the map's linears are quantized.

    asked: what else decides the plan. Raises FormatError for a map of another model's linears, and
    what `make_plan` raises.
    """
    default = QuantizationConfig(budget=Budget(bits=16))

    def planned(**changes: Any) -> tuple[Allocation, Plan]:
        allocation = Allocation(method="map", map=widths, order=widths.order, **changes)
        config = (asked or default).model_copy(update={"allocation": allocation})
        return allocation, make_plan(folder, config, gguf=gguf)

    found = planned()
    embeddings: Literal["keep", "quantize"] = "keep"
    if not widths.linears.keys() <= found[1].by_name.keys():
        embeddings = "quantize"
        found = planned(embeddings=embeddings)
    unknown = [name for name in widths.linears if name not in found[1].by_name]
    if unknown:
        raise FormatError(
            f"the bit-width map is of another model: {folder.name} has no linear {unknown[0]} "
            f"({len(unknown)} of the map's {len(widths.linears)} are missing)",
            param=unknown[0],
        )
    kept = tuple(name for name in found[1].by_name if name not in widths.linears)
    return planned(embeddings=embeddings, keep=kept) if kept else found
