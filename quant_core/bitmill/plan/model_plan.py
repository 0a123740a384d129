"""What a job will work on, from config and headers alone, before any weight loads. Torch-free.

A plan lists every linear that will be quantized with where its [N, K] weight lies in the source,
every other tensor that the packed checkpoint keeps as it is, and which linears read the same input.
Where the job quantizes them, input embedding and output head are listed apart, as matrices [V, D]
that are packed like linears; a tied head is the embedding.
Names are those of transformers' module tree; a source whose names lack the base model's prefix, or
that fuses experts, is described by each entry's `source`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bitmill.config.bit_width_map import LinearShape
from bitmill.config.quantization import Closed, QuantizationConfig
from bitmill.errors import ModelError, SpecError
from bitmill.io.gguf import gguf_config, gguf_tensors, read_gguf_header
from bitmill.io.safetensors import TensorInfo, read_headers
from bitmill.plan.architectures import (
    ELEMENTWISE,
    EMBEDDINGS,
    HEAD,
    ROUTERS,
    Architecture,
    block_prefix,
    sibling_key,
    stage_of,
)
from bitmill.plan.config_json import check_config, read_config, refuse_pickles, size_of

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
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
    def routed(self) -> bool:
        """Whether it belongs to an expert, which sees only the tokens that are sent to it."""
        return ".experts." in self.name


class PlannedTensor(Closed):
    """A tensor that the packed checkpoint keeps: biases, norms, embeddings, linears kept whole.

    name: its name there (the source's own, with a missing base prefix put back); module: its name
    in transformers' module tree, which differs for a few older formats.
    """

    name: str
    module: str
    dtype: str
    shape: tuple[int, ...]
    source: Source

    @cached_property
    def spec(self) -> TensorInfo:
        """Name, dtype and shape, as `bitmill.io.safetensors` counts them."""
        return TensorInfo(self.name, self.dtype, self.shape)


class Plan(Closed):
    """Everything later stages need to know about the model; see the module's text.

    linears: of the decoder blocks, in execution order. embeddings: input embedding and head, where
    they are quantized too. max_positions: None where the model has no limit.
    experts: routed experts of a block, 0 in a dense model.
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
        kept = {sibling_key(tensor.module.rpartition(".")[0]) for tensor in self.tensors}
        found: dict[tuple[int, str], list[PlannedLinear]] = {}
        for linear in self.linears:
            found.setdefault(sibling_key(linear.name), []).append(linear)
        feeders = {}
        for (stage, parent), (linear, *others) in found.items():
            source = (ELEMENTWISE.get(stage, -1), parent)
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

    def block_linears(self, block: int) -> list[PlannedLinear]:
        """Linears of one block, in execution order."""
        return self._by_block[block]

    def input_stages(self, block: int) -> list[list[list[str]]]:
        """Full names of a block's linears: stages in execution order, each a list of input groups.

        The members of a group read the same input; the groups of a stage can be captured in one
        pass: one group per stage in a dense block, one per expert in the experts' stages.
        """
        stages: dict[tuple[int, str], dict[tuple[int, str], list[str]]] = {}
        for linear in self.block_linears(block):
            stage, key = stage_of(linear.name)[0], sibling_key(linear.name)
            own = linear.name if key[1] == linear.name else ""
            stages.setdefault((stage, own), {}).setdefault(key, []).append(linear.name)
        return [list(groups.values()) for groups in stages.values()]

    def input_groups(self, block: int) -> list[list[str]]:
        """Full names that read the same input, in execution order: [[q, k, v], [o], ...]."""
        return [group for stage in self.input_stages(block) for group in stage]


def _is_expert_stack(name: str, header: TensorInfo) -> bool:
    return len(header.shape) == 3 and name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _unfuse(module: str, header: TensorInfo) -> Iterable[tuple[str, int, int, Source]]:
    """(path, N, K, source) of each expert's linears in a fused tensor [E, N, K]."""
    parent, _, leaf = module.rpartition(".")
    count, rows, columns = header.shape
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    if rows % len(parts):
        raise ModelError(f"{header.name} has {rows} rows, which gate and up cannot share")
    step = rows // len(parts)
    for expert in range(count):
        for place, part in enumerate(parts):
            source = Source(
                tensor=header.name, index=expert, rows=(place * step, (place + 1) * step)
            )
            yield f"{parent}.{expert}.{part}", step, columns, source


def _matrices(
    module: str, header: TensorInfo, found: Architecture
) -> list[tuple[str, int, int, Source]]:
    """(path, N, K, source) of the linears that a block's tensor holds; none for norms, routers."""
    if header.dtype not in FLOATS:
        return []
    if _is_expert_stack(module, header):
        return list(_unfuse(module, header))
    path, _, leaf = module.rpartition(".")
    if leaf != "weight" or len(header.shape) != 2 or path.rpartition(".")[2] in ROUTERS:
        return []
    rows, columns = reversed(header.shape) if found.transposed else header.shape
    return [(path, rows, columns, Source(tensor=header.name, transposed=found.transposed))]


def _embedding(module: str, header: TensorInfo) -> PlannedLinear | None:
    """The input embedding or head that a tensor outside the blocks is, if it is one."""
    path, _, leaf = module.rpartition(".")
    known = path == HEAD or path.rpartition(".")[2] in EMBEDDINGS
    if not known or leaf != "weight" or len(header.shape) != 2 or header.dtype not in FLOATS:
        return None
    rows, columns = header.shape
    source = Source(tensor=header.name)
    return PlannedLinear(
        name=path, block=-1, rows=rows, columns=columns, dtype=header.dtype, source=source
    )


def _check_embeddings(modules: Mapping[str, TensorInfo]) -> None:
    """Refuse a model whose tied matrix is stored under the head's name alone."""
    if not any(module.split(".")[-2] in EMBEDDINGS for module in modules if "." in module):
        raise ModelError(
            "the source stores no input embedding (a tied one lies under the head's name), so it "
            "cannot be quantized: set allocation.embeddings to 'keep'",
            code="no_embedding",
            param="allocation.embeddings",
        )


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def _order(linear: PlannedLinear) -> tuple[Any, ...]:
    """Execution order: block, stage, expert or parent, place among the siblings."""
    stage, place = stage_of(linear.name)
    parent = linear.name.rpartition(".")[0]
    numbers = tuple(int(part) for part in parent.split(".") if part.isdecimal())
    return linear.block, stage, numbers, parent, place, linear.name


def _kept_linear(linear: PlannedLinear) -> PlannedTensor:
    name = linear.name + ".weight"
    shape = (linear.rows, linear.columns)
    if linear.source.transposed:
        shape = (linear.columns, linear.rows)
    source = linear.source.model_copy(update={"transposed": False})
    return PlannedTensor(name=name, module=name, dtype=linear.dtype, shape=shape, source=source)


def _kept_tensor(name: str, module: str, header: TensorInfo) -> PlannedTensor:
    source = Source(tensor=header.name)
    return PlannedTensor(
        name=name, module=module, dtype=header.dtype, shape=header.shape, source=source
    )


def _check_matrices(linears: list[PlannedLinear]) -> None:
    for linear in linears:
        if not (0 < linear.rows <= 1 << 24 and 0 < linear.columns <= 1 << 24):
            raise ModelError(
                f"{linear.name} has the shape [{linear.rows}, {linear.columns}]; both sides must "
                f"be 1 to {1 << 24}",
                code="bad_shape",
            )
    if not any(linear.block >= 0 for linear in linears):
        raise ModelError("the model has no linear to quantize", code="no_linears")


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def build_plan(
    config: dict[str, Any],
    found: Architecture,
    headers: Mapping[str, TensorInfo],
    keep: tuple[str, ...] = (),
    quantize_embeddings: bool = False,
) -> Plan:
    """The plan of a model from its sanitized config and its tensors' headers.

    keep: glob patterns of full names of linears and embeddings that stay in the source's precision.
    """
    count = size_of(config, "num_hidden_layers") or 0
    names = {stored: found.names(stored) for stored in headers}
    modules = {module: headers[stored] for stored, (_, module) in names.items()}
    if len(modules) != len(headers):
        raise ModelError("two stored tensors mean the same parameter", code="duplicate_tensor")
    prefix = block_prefix(modules, count)
    linears: list[PlannedLinear] = []
    tensors: list[PlannedTensor] = []
    embeddings: list[PlannedLinear] = []
    for module, header in sorted(modules.items(), key=lambda item: _natural(item[0])):
        rest = module.removeprefix(prefix + ".")
        matrices = _matrices(module, header, found) if rest != module else []
        for path, rows, columns, source in matrices:
            linear = PlannedLinear(
                name=path,
                block=int(rest.partition(".")[0]),
                rows=rows,
                columns=columns,
                dtype=header.dtype,
                source=source,
            )
            if _matches(path, keep):
                tensors.append(_kept_linear(linear))
            else:
                linears.append(linear)
        embedding = _embedding(module, header) if quantize_embeddings and rest == module else None
        if embedding is not None and not _matches(embedding.name, keep):
            embeddings.append(embedding)
        elif not matrices:
            tensors.append(_kept_tensor(names[header.name][0], module, header))
    _check_matrices(linears + embeddings)
    if quantize_embeddings:
        _check_embeddings(modules)
    return Plan(
        model_type=found.model_type,
        block_prefix=prefix,
        block_count=count,
        hidden_size=size_of(config, "hidden_size") or 0,
        vocab_size=size_of(config, "vocab_size") or 0,
        max_positions=size_of(config, "max_position_embeddings"),
        experts=size_of(config, "num_experts") or 0,
        linears=tuple(sorted(linears, key=_order)),
        tensors=tuple(tensors),
        embeddings=tuple(embeddings),
    )


def check_lengths(plan: Plan, asked: QuantizationConfig) -> None:
    """Raise `SpecError` where the model cannot run the job's calibration or evaluation windows."""
    plan.check_length(asked.calibration.length, "calibration.length")
    plan.check_length(asked.evaluation.length, "evaluation.length")


def check_rows(plan: Plan, asked: QuantizationConfig) -> None:
    """Raise `SpecError` where a linear has fewer output rows than devices that divide them."""
    for linear in plan.linears:
        if linear.rows < asked.devices:
            raise SpecError(
                f"devices is {asked.devices}, {linear.name} has {linear.rows} output rows to "
                "divide: give at most as many devices, or keep that linear",
                param="devices",
            )


def make_plan(folder: Path, asked: QuantizationConfig, *, gguf: str | None = None) -> Plan:
    """Plan a job for a local model folder, or for one GGUF file in it.

    Raises `ModelError` for files that are missing, unsafe, damaged or unsupported.
    """
    if gguf is not None:
        header = read_gguf_header(folder / gguf)
        config = gguf_config(header)
        found, headers = check_config(config), gguf_tensors(folder / gguf, header)
    else:
        refuse_pickles(folder)
        config, found = read_config(folder)
        headers = read_headers(folder)
    allocation = asked.allocation
    return build_plan(config, found, headers, allocation.keep, allocation.embeddings == "quantize")
