"""What may follow a block's first solution: a learner, which trains the block against the source.

A method names its learner (`MethodConfig.learner`); `refinement/omniquant/` has some.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from bitmill.calibration.windows import CalibrationSet
from bitmill.quant.tensors import Quantized
from bitmill.results import BlockQuality, TuningQuality


class LearnedBlock(Protocol):
    """What a learner made of one block."""

    @property
    def weights(self) -> Mapping[str, Quantized]:
        """The weights that are kept, by full name."""

    @property
    def report(self) -> BlockQuality:
        """What it did."""


class TunedModel(Protocol):
    """What tuning made of the whole model."""

    @property
    def weights(self) -> Mapping[str, Quantized]:
        """Those of every quantized linear, by full name."""

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """Norms and biases that changed, by their names in the module tree."""

    @property
    def report(self) -> TuningQuality:
        """How it went."""


class Learner(Protocol):
    """Sees the blocks of a model in order, then the model.

    What `MethodConfig.learner` names makes it: learner(model, quantized, tokens, settings, folder,
    seed=seed), with the float model, the model with its dequantized embeddings, the
    `CalibrationSet`, the method's settings and a folder to keep things in.
    """

    @staticmethod
    def watched(tokenizer_folder: Path, tokens: CalibrationSet) -> Mapping[str, Tensor]:
        """What it reads besides that, for the key of a stage: windows int64 [S, T] by text."""

    def block(
        self,
        index: int,
        block: nn.Module,
        starts: Mapping[str, Quantized],
        inputs: Tensor,
        targets: Tensor,
    ) -> LearnedBlock | None:
        """Learn one block; on return its linears hold the kept weights. None where blocks are not
        learned.

        inputs, targets: [S + S2, T, D], the held-out sequences behind the calibration sequences:
        the block's inputs behind the quantized prefix, and the float block's outputs in the float
        model.
        """

    def advance(self, index: int, block: nn.Module) -> None:
        """Go on behind a block, learned now or by an earlier run; it holds what it keeps."""

    def tune(
        self,
        weights: Mapping[str, Quantized],
        matrices: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor],
    ) -> TunedModel | None:
        """The whole model tuned end to end, or None where that is not asked for.

        matrices: the dequantized embeddings and heads, f32 [V, D], which stay as they are. vectors:
        norms and biases that are no longer the source's, by their names in the module tree.
        """
