"""Learning as part of a whole model's refinement: what surrounds `learn_block` and `tune_scales`.

Before the first block one backward pass of the float model measures where errors of each block's
output matter (`metric.py`); it is kept beside the refined blocks, so a run that goes on
after a kill uses the same numbers. A few windows of other texts travel along to be measured only
(`watched_texts.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from bitmill.calibration.windows import CalibrationSet
from bitmill.config.methods import OmniQuant
from bitmill.io.atomic import write_bytes
from bitmill.models.streamed import StreamedModel
from bitmill.quant.tensors import Quantized, affine
from bitmill.refinement.omniquant.block import (
    BlockData,
    LearnedBlock,
    check_held_out,
    learn_block,
)
from bitmill.refinement.omniquant.end_to_end import TunedModel, TuneSettings, tune_scales
from bitmill.refinement.omniquant.metric import OutputMetric, fisher_metric, gradient_moments
from bitmill.refinement.omniquant.settings import LearningSettings
from bitmill.refinement.omniquant.watched_texts import WatchedTexts, watched_texts

MOMENT_SEQUENCES = 16
MOMENTS_NAME = "gradient-moments.safetensors"
TRELLIS_RATE = 2e-3
"""Of scales, norms and biases of models in trellis codes."""
TRELLIS_EVALUATIONS = 6


class _Tuning:
    """What learning of all codes shares: the model is tuned end to end behind its last block."""

    def __init__(
        self,
        model: StreamedModel,
        tokens: CalibrationSet,
        settings: TuneSettings,
        texts: Mapping[str, Tensor],
        seed: int,
    ) -> None:
        if settings.steps:
            check_held_out(len(tokens.held_out))
        self.model, self.tokens, self.seed = model, tokens, seed
        self._tuning, self._texts = settings, texts

    @staticmethod
    def watched(tokenizer_folder: Path, tokens: CalibrationSet) -> Mapping[str, Tensor]:
        """Windows int64 [S, T] of the texts that are only measured."""
        return watched_texts(tokenizer_folder, tokens)

    def tune(
        self,
        weights: Mapping[str, Quantized],
        matrices: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor],
    ) -> TunedModel | None:
        """See `Learner`."""
        if not self._tuning.steps:
            return None
        return tune_scales(
            self.model,
            weights,
            self.tokens.tokens,
            self.tokens.held_out,
            self._tuning,
            seed=self.seed,
            matrices=matrices,
            vectors=vectors,
            texts=self._texts,
        )


class ModelLearning(_Tuning):
    """Learns the blocks of one model in order, then its scales end to end.

    quantized: the model with its dequantized embeddings. folder: where moments are kept.
    """

    def __init__(
        self,
        model: StreamedModel,
        quantized: StreamedModel,
        tokens: CalibrationSet,
        spec: OmniQuant,
        folder: Path,
        *,
        seed: int,
    ) -> None:
        self.texts = WatchedTexts(model, quantized, tokens)
        settings = TuneSettings(steps=spec.tune_scales_steps)
        super().__init__(model, tokens, settings, self.texts.tokens, seed)
        self.settings, self.folder = LearningSettings.of_spec(spec), folder
        self._moments: list[Tensor] | None = None

    def block(
        self,
        index: int,
        block: nn.Module,
        starts: Mapping[str, Quantized],
        inputs: Tensor,
        targets: Tensor,
    ) -> LearnedBlock:
        """Learn one block; on return its linears hold the kept weights.

        inputs, targets: [S + S2, T, D], the held-out sequences behind the calibration sequences:
        the block's inputs behind the quantized prefix, and the float block's outputs in the float
        model.
        """
        count = len(self.tokens.tokens)
        data = BlockData(
            inputs[:count],
            targets[:count],
            inputs[count:],
            targets[count:],
            self.texts.pairs(index),
        )
        return learn_block(
            self.model,
            index,
            block,
            affine(starts),
            data,
            self.settings,
            seed=self.seed,
            metric=self._metric(index),
        )

    def advance(self, index: int, block: nn.Module) -> None:
        """Go on behind a block, learned now or by an earlier run; it holds what it keeps."""
        self.texts.advance(index, block)

    def _metric(self, index: int) -> OutputMetric:
        if self.settings.block_error == "plain":
            return OutputMetric()
        if self._moments is None:
            self._moments = self._load_moments()
        return fisher_metric(self._moments[index].to(self.model.device), self.settings.shrink)

    def _load_moments(self) -> list[Tensor]:
        path = self.folder / MOMENTS_NAME
        if path.is_file():
            stored = safetensors.torch.load_file(path)
            return [stored[str(i)] for i in range(len(stored))]
        tokens = self.tokens.tokens[:MOMENT_SEQUENCES]
        moments = gradient_moments(self.model, tokens, seed=self.seed)
        named = {str(i): moment for i, moment in enumerate(moments)}
        write_bytes(path, safetensors.torch.save(named))
        return moments


def tune_settings(spec: OmniQuant) -> TuneSettings:
    """How a model in trellis codes is tuned."""
    batch = spec.batch or TuneSettings.batch
    rate, evaluations = TRELLIS_RATE, TRELLIS_EVALUATIONS
    return TuneSettings(spec.tune_scales_steps, batch, rate, evaluations, vector_rate=rate)


class TrellisLearning(_Tuning):
    """Tunes scales, norms and biases of a model in trellis codes; blocks keep their first solution.

    Arguments as `Learner` says.
    """

    def __init__(
        self,
        model: StreamedModel,
        quantized: StreamedModel,
        tokens: CalibrationSet,
        spec: OmniQuant,
        folder: Path,
        *,
        seed: int,
    ) -> None:
        texts = watched_texts(model.source.folder, tokens, model.plan.vocab_size)
        super().__init__(model, tokens, tune_settings(spec), texts, seed)

    def block(
        self,
        index: int,
        block: nn.Module,
        starts: Mapping[str, Quantized],
        inputs: Tensor,
        targets: Tensor,
    ) -> None:
        """Blocks are not learned."""

    def advance(self, index: int, block: nn.Module) -> None:
        """Nothing is carried from block to block."""
