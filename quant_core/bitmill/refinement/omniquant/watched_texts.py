"""Texts that learning never sees, carried through the blocks beside the calibration text.

Held-out windows choose what learning keeps, and they come from the calibration text. Whether a gain
holds for other text is told by a few windows of the bundled evaluation texts: the error of each
block on them is measured before and after, and no choice depends on it.

`overfitting_warnings` (in `reporting/learning.py`) reads the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from bitmill.calibration.hooks import run_windows
from bitmill.calibration.windows import CalibrationSet, evaluation_tokens
from bitmill.models.streamed import StreamedModel

TEXTS = ("wiki_evaluation", "handbook_evaluation")
WINDOWS = 4
LENGTH = 2048


def watched_texts(
    tokenizer_folder: Path, tokens: CalibrationSet, rows: int | None = None
) -> Mapping[str, Tensor]:
    """int64 [S, T] of every text, which begin as the calibration windows do and are as long, at
    most `LENGTH`; rows: of the model's input embedding."""
    return {
        name: evaluation_tokens(
            name,
            tokenizer_folder,
            length=min(tokens.tokens.shape[1], LENGTH),
            sequences=WINDOWS,
            framing=tokens.framing,
            rows=rows,
        )
        for name in TEXTS
    }


class WatchedTexts:
    """Hidden states of every text at the input of the next block, in both models.

    quantized: the model with its dequantized embeddings. tokens: the calibration windows.
    """

    def __init__(
        self, model: StreamedModel, quantized: StreamedModel, tokens: CalibrationSet
    ) -> None:
        self._model = model
        self.tokens = watched_texts(model.source.folder, tokens, model.plan.vocab_size)
        self._hidden = {name: quantized.embed(t).cpu() for name, t in self.tokens.items()}
        self._source = {name: model.embed(t).cpu() for name, t in self.tokens.items()}
        self._targets: dict[str, Tensor] | None = None

    def pairs(self, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs from the quantized prefix and float outputs of block `index`, [S, T, D] each."""
        if self._targets is None:
            block = self._model.load_block(index)
            self._targets = {name: self._run(index, block, x) for name, x in self._source.items()}
        return {name: (x, self._targets[name]) for name, x in self._hidden.items()}

    def advance(self, index: int, block: nn.Module) -> None:
        """Move behind block `index`; `block` holds the weights that it keeps."""
        self._source = {name: targets for name, (_, targets) in self.pairs(index).items()}
        self._hidden = {name: self._run(index, block, x) for name, x in self._hidden.items()}
        self._targets = None

    def _run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        return run_windows(self._model, index, block, hidden, batch=WINDOWS)
