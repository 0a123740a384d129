"""Refinement of a whole model, block by block, and what it leaves on disk.

Every finished block is saved (`store.py`) while the next one is refined. A run that was
killed reloads finished blocks, puts their dequantized weights into the stream and goes on: the
inputs of later blocks, and so their bytes, are the same. Held-out sequences travel behind the
calibration sequences.

Where the method has a learner (`learner.py`), each block is learned after its first solution, and
what tunes the whole model at the end leaves its blocks in the subfolder `tuned`.

Embeddings and heads that are quantized too come first: the blocks read what the quantized embedding
gives.

Of several ranks each carries the hidden states of its own windows; the first one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from bitmill.calibration.hooks import run_windows
from bitmill.calibration.kept_weights import KeptWeights
from bitmill.calibration.loss_weights import LossWeights, loss_weights
from bitmill.calibration.replay import Replay
from bitmill.calibration.statistics import BlockState, Stream, advance_hidden
from bitmill.calibration.streams import HiddenStates
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.methods import MethodConfig
from bitmill.config.transforms import TransformConfig
from bitmill.io import atomic as storage
from bitmill.models.streamed import StreamedModel, set_weight
from bitmill.plan.block_memory import BATCH_TOKENS, refining_bytes
from bitmill.plan.model_plan import Plan
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.tensors import Quantized, Stored
from bitmill.refinement.block import RefineSettings, refine_block
from bitmill.refinement.embeddings import quantize_embeddings
from bitmill.refinement.folding import fold_scales
from bitmill.refinement.learner import Learner
from bitmill.refinement.store import (
    EMBEDDINGS,
    BlockSaver,
    SavedBlock,
    is_finished,
    load_block,
    parts_of,
    report_path,
    save_block,
)
from bitmill.refinement.vectors import changed_vectors, restore_vectors, vectors
from bitmill.registry import load_object
from bitmill.results import BlockQuality, LinearResult, TuningQuality
from bitmill.runtime.graphs import graphs_kept
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.solvers.solver import solver_of
from bitmill.transforms.column_order import ColumnOrders
from bitmill.transforms.outliers import OutlierColumns
from bitmill.transforms.transform import made_of

TUNED_NAME = "tuned"
TUNING_NAME = "tuning.json"
WEIGHTS_NAME = "loss-weights.safetensors"
FORMER_WEIGHTS_NAME = "token-weights.safetensors"
"""Of a run that an earlier version began; it is not read."""


@dataclass(frozen=True, eq=False)
class RefineInputs:
    """Calibration windows, the map, and each linear's column order (i64 [K]) where it has one."""

    tokens: CalibrationSet
    bit_widths: BitWidthMap
    orders: Mapping[str, Tensor]


class RefinedModel:
    """The folder that `refine_model` filled. blocks: as it was told."""

    def __init__(self, folder: Path, plan: Plan, blocks: int | None = None) -> None:
        tuned = folder / TUNED_NAME
        self._count = plan.block_count if blocks is None else blocks
        self.folder, self.plan = tuned if tuned.is_dir() else folder, plan
        self._blocks: dict[int, SavedBlock] = {}

    @property
    def digest(self) -> str:
        """Hash of all block reports, which hold the hashes of all packed tensors."""
        files = [report_path(self.folder, i) for i in parts_of(self.plan)]
        return storage.sha256_json([storage.sha256_file(file) for file in files])

    def code_hashes(self) -> dict[str, str]:
        """SHA-256 of the codes u8 [N, K] of every linear and embedding."""
        hashes: dict[str, str] = {}
        for i in parts_of(self.plan):
            hashes |= storage.read_json(report_path(self.folder, i))["code_hashes"]
        return hashes

    def linear(self, name: str) -> Quantized:
        """One refined linear or embedding."""
        return self.packed(name).unpack()

    @cached_property
    def changed(self) -> dict[str, Tensor]:
        """Parameters beside linears that are no longer the source's, by their names in the module
        tree."""
        found: dict[str, Tensor] = {}
        for i in range(self._count):
            found |= SavedBlock(self.folder, self.plan, i).changed
        return found

    def rewrites(self, name: str) -> Rewrites:
        """The rewrites of one refined linear."""
        return self._block_of(name).rewrites(name)

    def packed(self, name: str) -> Stored:
        """One refined linear or embedding as it is stored."""
        return self._block_of(name).packed(name)

    def solved(self, name: str, packed: Stored) -> Stored:
        """What `packed` gives is what was solved."""
        return packed

    def _block_of(self, name: str) -> SavedBlock:
        i = self.plan.by_name[name].block
        if i not in self._blocks:
            self._blocks[i] = SavedBlock(self.folder, self.plan, i)
        return self._blocks[i]

    def reports(self) -> tuple[tuple[LinearResult, ...], tuple[BlockQuality, ...]]:
        """What refinement says of every linear, and of every block where it learned."""
        linears: list[LinearResult] = []
        blocks: list[BlockQuality] = []
        for i in parts_of(self.plan):
            data = storage.read_json(report_path(self.folder, i))
            linears += [LinearResult.model_validate(entry) for entry in data["linears"]]
            if data["learning"] is not None:
                blocks.append(BlockQuality.model_validate(data["learning"]))
        return tuple(linears), tuple(blocks)

    def tuning(self) -> TuningQuality | None:
        """What tuning all scales did, where the job asked for it."""
        path = self.folder / TUNING_NAME
        if not path.is_file():
            return None
        return TuningQuality.model_validate(storage.read_json(path))


def refine_model(
    model: StreamedModel,
    inputs: RefineInputs,
    method: MethodConfig,
    folder: Path,
    *,
    seed: int,
    on_unit: Callable[[int, int, str, str], None],
    transforms: Sequence[TransformConfig] = (),
    group: Ranks = SINGLE,
    host_bytes: int | None = None,
    weights: KeptWeights | None = None,
    blocks: int | None = None,
) -> None:
    """Quantize every linear of the map; `folder` may hold blocks of an earlier, killed run.

    on_unit: told blocks saved, their number, the unit and a message. transforms: rewrite linears
    after the column orders, before they are solved. group: ranks that make this
    call together. host_bytes: limit of the hidden states that this rank keeps in host memory
    (`calibration/streams.py`); past it they wait in files of `folder`. weights: of tokens and rows,
    from a profile's pass over these windows. blocks: end behind so many, None for all; another call
    goes on there.
    """
    if group.first:
        _refine_embeddings(model, inputs, folder)
    count = model.block_count if blocks is None else blocks
    finished = group.broadcast([is_finished(folder, i) for i in range(count)])
    embeddings = _load_embeddings(folder, model.plan)
    matrices = {name: weight.dequantize() for name, weight in embeddings.items()}
    quantized = model.with_matrices(matrices)

    def tell(i: int) -> None:
        on_unit(i + 1, model.block_count, "block", "")

    tokens = max(BATCH_TOKENS, inputs.tokens.tokens.shape[1])
    turn = refining_bytes(
        model.plan,
        model.dtype.itemsize,
        tokens,
        judged="shift" in method.needs,
        folded=any(one.folded for one in transforms),
    )
    with (
        HiddenStates(model.device, folder, turn=turn, group=group, host_bytes=host_bytes) as states,
        BlockSaver(folder, model.device, tell) as saver,
        graphs_kept(model.device),
    ):
        run = _Run(
            model, quantized, inputs, method, transforms, folder, seed, group, states, weights
        )
        for i in range(count):
            block = model.load_block(i)
            if finished[i]:
                solved = load_block(folder, model.plan, i)
                for name, module in model.linears(block, i).items():
                    if name in solved:
                        set_weight(module, solved[name].dequantize())
                restore_vectors(model, i, block, SavedBlock(folder, model.plan, i).changed)
            else:
                refined = run.refine(i, block, saver.look)
                if group.first:
                    saver.save(i, *refined)
                del refined  # the saver drops it when the block is saved
            if i + 1 < count:
                run.advance(i, block)
            if finished[i] or not group.first:
                saver.wait()
                tell(i)
        saver.wait()
    if run.learning is not None and count == model.block_count:
        _tune(run.learning, model.plan, folder)
    group.barrier()


def _tune(learning: Learner, plan: Plan, folder: Path) -> None:
    """Tune all refined blocks together, if the job asks for it."""
    loaded: dict[str, Quantized] = {}
    vectors: dict[str, Tensor] = {}
    for i in range(plan.block_count):
        loaded |= load_block(folder, plan, i)
        vectors |= SavedBlock(folder, plan, i).changed
    embeddings = _load_embeddings(folder, plan)
    matrices = {name: weight.dequantize() for name, weight in embeddings.items()}
    tuned = learning.tune(loaded, matrices, vectors)
    if tuned is None:
        return
    with storage.atomic_folder(folder / TUNED_NAME) as target:
        for i in range(plan.block_count):
            data = storage.read_json(report_path(folder, i))
            linears = [LinearResult.model_validate(entry) for entry in data["linears"]]
            block = {linear.name: tuned.weights[linear.name] for linear in plan.block_linears(i)}
            own = f"{plan.block_prefix}.{i}."
            moved = {name: v for name, v in tuned.vectors.items() if name.startswith(own)}
            changed = SavedBlock(folder, plan, i).changed | moved
            save_block(target, i, block, linears, data["learning"], changed)
        if embeddings:
            data = storage.read_json(report_path(folder, EMBEDDINGS))
            linears = [LinearResult.model_validate(entry) for entry in data["linears"]]
            save_block(target, EMBEDDINGS, embeddings, linears, None)
        storage.write_json(target / TUNING_NAME, tuned.report.model_dump(mode="json"))


def _refine_embeddings(model: StreamedModel, inputs: RefineInputs, folder: Path) -> None:
    """Quantize embeddings and heads, where the plan does."""
    if model.plan.embeddings and not is_finished(folder, EMBEDDINGS):
        widths = inputs.bit_widths.linears
        weights, reports = quantize_embeddings(model, inputs.tokens.tokens, widths)
        save_block(folder, EMBEDDINGS, weights, reports, None)


def _load_embeddings(folder: Path, plan: Plan) -> dict[str, Quantized]:
    return load_block(folder, plan, EMBEDDINGS) if plan.embeddings else {}


_Refined = tuple[
    Mapping[str, Quantized], list[LinearResult], dict[str, Any] | None, dict[str, Tensor]
]
"""Weights, results, what was learned and what else of the block has changed."""


def _loss_weights(
    model: StreamedModel,
    tokens: Tensor,
    held_out: Tensor,
    folder: Path,
    kept: KeptWeights | None,
    group: Ranks,
) -> LossWeights:
    """Of this rank's calibration windows and those held out behind them, each of mean 1 over all
    windows, and of rows: those of an earlier run, so that a run that goes on uses the same numbers;
    else new ones, or for calibration those that a profile left.
    """
    path = folder / WEIGHTS_NAME
    if not group.broadcast(path.is_file()):
        known = kept.load(model.block_count) if kept is not None and group.first else None
        if not group.broadcast(known is not None):
            known = loss_weights(model, tokens, group=group)
        judged = loss_weights(model, held_out, group=group).tokens
        if group.first and known is not None:
            joined = {
                name: torch.cat([own, judged[name]]) if len(held_out) else own
                for name, own in known.tokens.items()
                if name in judged or not len(held_out)
            }
            found = LossWeights(joined, known.rows)
            storage.write_bytes(path, safetensors.torch.save(found.tensors()))
            (folder / FORMER_WEIGHTS_NAME).unlink(missing_ok=True)
        group.barrier()
    count, found = len(tokens), LossWeights.of_tensors(safetensors.torch.load_file(path))
    own = {
        name: torch.cat([group.shard(weight[:count]), group.shard(weight[count:])])
        for name, weight in found.tokens.items()
    }
    return LossWeights(own, found.rows)


class _Run:
    """The streams of hidden states that one refinement carries from block to block."""

    def __init__(
        self,
        model: StreamedModel,
        quantized: StreamedModel,
        inputs: RefineInputs,
        method: MethodConfig,
        transforms: Sequence[TransformConfig],
        folder: Path,
        seed: int,
        group: Ranks,
        states: HiddenStates,
        weights: KeptWeights | None,
    ) -> None:
        self.model, self.inputs, self.solver = model, inputs, solver_of(method)
        kept = [made_of(one) for one in transforms if not one.folded]
        self.outliers = OutlierColumns(inputs.bit_widths.outliers)
        self.transforms = ColumnOrders(inputs.orders), *kept, self.outliers
        self.scalings = [made_of(one) for one in transforms if one.folded]
        self.group = group
        calibration, held_out = inputs.tokens.tokens, inputs.tokens.held_out
        if "shift" not in method.needs and method.learner is None:
            held_out = held_out[:0]  # only corrections and learning are judged on them
        own = group.shard(calibration)
        tokens = torch.cat([own, group.shard(held_out)])
        if not method.needs and method.learner is None:
            own = tokens = tokens[:0]  # nobody asks what the blocks make of them
        self.weights = LossWeights({}, {})
        if "gradient" in method.needs:
            self.weights = _loss_weights(model, calibration, held_out, folder, weights, group)
        self.batch = max(1, BATCH_TOKENS // tokens.shape[1])
        self.count = len(own)
        self.hidden = states.embed(quantized, tokens, self.batch)
        self.needs, self.tile = method.needs, method.tile
        if not len(inputs.tokens.held_out):
            self.needs -= {"shift"}
        self.learning: Learner | None = None
        if method.learner is not None:
            make = load_object(method.learner)
            self.learning = make(model, quantized, inputs.tokens, method, folder, seed=seed)
        needed = self.shifts or self.learning is not None
        self.source = states.embed(model, tokens, self.batch) if needed else None
        self._source_is_behind: int | None = None
        self._streams = (
            self._stream(slice(None, self.count)),
            self._stream(slice(self.count, None)),
        )
        self._replay = Replay()

    @property
    def shifts(self) -> bool:
        """Whether the solver sees the source's streams, and so moves them on."""
        return "shift" in self.needs

    def refine(self, i: int, block: nn.Module, on_step: Callable[[], None]) -> _Refined:
        names = [linear.name for linear in self.model.plan.block_linears(i)]
        widths = {name: self.inputs.bit_widths.linears[name] for name in names}
        before = vectors(self.model, i, block)
        for scaling in self.scalings:
            stream, orders = self._streams[0], self.inputs.orders
            fold_scales(self.model, i, block, stream, widths, orders, scaling, batch=self.batch)
        # A folded block rounds otherwise than the source's, which a run that goes on has.
        advances = self.shifts and not self.scalings
        weights: Mapping[str, Quantized]
        weights, results = refine_block(
            self.model,
            i,
            block,
            self._streams[0],
            widths,
            RefineSettings(
                self.solver,
                self.needs,
                self.transforms,
                self.batch,
                advance_source=advances,
                alike=self.outliers.alike,
                importance=self.weights.rows,
                tile=self.tile,
            ),
            held_out=self._streams[1] if self.shifts else None,
            on_step=on_step,
            replay=self._replay if self.learning is None else None,
        )
        if advances and names:
            self._source_is_behind = i
        report = None
        if self.learning is not None and self.source is not None and names:
            if self._source_is_behind != i:
                self._advance_source(i)
            learned = self.learning.block(i, block, weights, self.hidden, self.source)
            if learned is not None:
                weights, report = learned.weights, learned.report.model_dump(mode="json")
        return weights, results, report, changed_vectors(before, vectors(self.model, i, block))

    def _stream(self, part: slice) -> Stream:
        source = self.source[part] if self.source is not None and self.shifts else None
        weights = {name: weight[part] for name, weight in self.weights.tokens.items()}
        return Stream(self.hidden[part], source, self.group, weights)

    def advance(self, i: int, block: nn.Module) -> None:
        """Move the streams behind block i: quantized, and of the source where it is carried."""
        linears = self.model.linears(block, i)
        state = BlockState(self.model, i, block, None, linears, replay=self._replay)
        for stream in self._streams:
            advance_hidden(state, stream, batch=self.batch)
        self._replay = Replay()
        if self.source is not None and self._source_is_behind != i:
            self._advance_source(i)
        if self.learning is not None:
            self.learning.advance(i, block)

    def _advance_source(self, i: int) -> None:
        """In the batches that statistics are taken in: the same bytes, whoever runs the source."""
        assert self.source is not None
        block = self.model.load_block(i)
        for windows in (self.source[: self.count], self.source[self.count :]):
            run_windows(self.model, i, block, windows, batch=self.batch, out=windows)
        self._source_is_behind = i
