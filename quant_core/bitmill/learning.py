"""Learning as part of a whole model's refinement: what surrounds `learn_block`.

Before the first block one backward pass of the float model measures where errors of each block's
output matter (`output_metric.py`); it is kept beside the refined blocks, so a run that goes on
after a kill uses the same numbers. Every learned block leaves `learned-00012.safetensors`; a
folder of those given as `resume_parameters` is applied instead of learning, without any training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from bitmill.block_learning import BlockData, LearnedBlock, apply_learned, learn_block
from bitmill.blocks import StreamedModel
from bitmill.calibration import CalibrationSet
from bitmill.omniquant import LearningSettings, load_learned, save_learned
from bitmill.output_metric import OutputMetric, fisher_metric, gradient_moments
from bitmill.packed import QuantizedWeight
from bitmill.spec import OmniQuant
from bitmill.storage import write_bytes
from bitmill.tune_scales import TuneReport, TuneSettings, tune_scales

MOMENT_SEQUENCES = 16
MOMENTS_NAME = "gradient-moments.safetensors"


class ModelLearning:
    """Learns the blocks of one model in order, then its scales end to end.

    folder: where moments and learned parameters are kept. resume_parameters: a folder of learned
    parameters to apply instead of learning.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokens: CalibrationSet,
        spec: OmniQuant,
        folder: Path,
        *,
        seed: int,
        resume_parameters: Path | None = None,
        should_stop: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.tokens, self.spec, self.folder = model, tokens, spec, folder
        self.settings = LearningSettings.of_spec(spec)
        self.seed, self.resume, self.should_stop = seed, resume_parameters, should_stop
        self._moments: list[Tensor] | None = None

    def block(
        self,
        index: int,
        block: nn.Module,
        starts: Mapping[str, QuantizedWeight],
        inputs: Tensor,
        targets: Tensor,
    ) -> LearnedBlock:
        """Learn one block; on return its linears hold the kept weights.

        inputs, targets: [S + S2, T, D], the held-out sequences behind the calibration sequences:
        the block's inputs behind the quantized prefix, and the float block's outputs in the float
        model.
        """
        count = len(self.tokens.tokens)
        data = BlockData(inputs[:count], targets[:count], inputs[count:], targets[count:])
        metric = self._metric(index)
        if self.resume is not None:
            tensors = load_learned(learned_path(self.resume, index))
            mode = self.settings.mode
            learned = apply_learned(
                self.model, index, block, starts, tensors, data, mode=mode, metric=metric
            )
        else:
            learned = learn_block(
                self.model,
                index,
                block,
                starts,
                data,
                self.settings,
                seed=self.seed,
                metric=metric,
                should_stop=self.should_stop,
            )
        save_learned(learned_path(self.folder, index), learned.tensors)
        return learned

    def tune(
        self, weights: Mapping[str, QuantizedWeight], matrices: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, QuantizedWeight], TuneReport] | None:
        """All weights with tuned scales, or None where the job asks for no tuning.

        matrices: the dequantized embeddings and heads, which are not tuned.
        """
        if not self.spec.tune_scales_steps:
            return None
        return tune_scales(
            self.model,
            weights,
            self.tokens.tokens,
            self.tokens.held_out,
            TuneSettings(steps=self.spec.tune_scales_steps),
            seed=self.seed,
            should_stop=self.should_stop,
            matrices=matrices,
        )

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


def learned_path(folder: Path, index: int) -> Path:
    """The file of one block's learned parameters."""
    return folder / f"learned-{index:05}.safetensors"
