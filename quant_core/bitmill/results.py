"""The quality report of a job: what was measured, on how many tokens, how exactly. Torch-free.

Perplexity is exp(mean negative log-likelihood in nats per predicted token). KL is
KL(source || quantized) of the next-token distributions, mean nats per token. Standard errors are
over windows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bitmill.errors import FormatError, absent, reason

QUALITY_NAME = "quality.json"


def with_error(value: float, error: float, form: str) -> str:
    """A mean and its standard error, `22.15 ± 0.31`; alone where a single window tells no error."""
    shown = format(value, form)
    return f"{shown} ± {format(error, form.removeprefix('+'))}" if error > 0 else shown


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextQuality(_Closed):
    """One model on one text. All but `perplexity` compare with the source model.

    loss_increase: mean nll less the source's, nats per token; its standard error is that of the
    paired differences, which is far smaller than perplexity's own.
    """

    windows: int
    tokens: int
    perplexity: float
    perplexity_se: float
    kl: float = 0.0
    kl_se: float = 0.0
    loss_increase: float = 0.0
    loss_increase_se: float = 0.0
    top1_agreement: float = 1.0


class TaskMetric(_Closed):
    """One metric of a task; `se` is its standard error over samples, None where it has none."""

    value: float
    se: float | None = None


class TaskQuality(_Closed):
    """One lm-evaluation-harness task. Metrics by the harness's names, e.g. acc and acc_norm.

    samples: how many examples were scored; version: the task's own version.
    """

    samples: int
    version: str
    metrics: dict[str, TaskMetric]


class QualityRow(_Closed):
    """One line of the table: the source model, the job's result or a baseline.

    code_bits and bits are as in the budget (None for the source); size is bytes of all safetensors
    files (None where no files were written). predicted_loss: what the job's profile says of these
    widths in the profile's own column order, to be held against the texts' `loss_increase`; None
    where there is no profile of these widths. gap: `loss_increase` of the last text over that of
    the first; None where that is no gain or there is one text.
    """

    method: str
    code_bits: float | None = None
    bits: float | None = None
    size: int | None = None
    predicted_loss: float | None = None
    gap: float | None = None
    texts: dict[str, TextQuality]
    tasks: dict[str, TaskQuality] = {}


class LinearResult(_Closed):
    """What refinement reports of one linear.

    relative_error: tr(R H R^T) / tr(W H W^T), R = W - W_quantized, on the inputs it was
    quantized with. damping: fraction of mean diag(H) that the factorization needed.
    scale_refit_gain: share of the error before polishing that polishing removed. asymmetric:
    whether its target answers to the quantized prefix. tokens: calibration tokens that reached it.
    notes: anything out of the ordinary (fallbacks, dead columns, starved experts).
    """

    name: str
    code_bits: float
    relative_error: float
    damping: float | None = None
    scale_refit_gain: float | None = None
    asymmetric: bool | None = None
    tokens: int | None = None
    notes: tuple[str, ...] = ()


class BlockQuality(_Closed):
    """What learning did to one decoder block.

    loss_before, loss_after: the block's error on held-out calibration sequences, with the first
    solution (GPTQ's, or rounding's in mode "clipping") and with what was kept. `kept` says which
    that is. texts: the same two errors on texts that no choice depends on. curve: (step, loss on
    the held-out sequences). recorded: whether steps were replayed from a CUDA graph.
    """

    index: int
    mode: str
    kept: Literal["learned", "start"]
    loss_before: float
    loss_after: float
    texts: dict[str, tuple[float, float]] = {}
    seconds: float
    steps: int = 0
    best_step: int = 0
    rollbacks: int = 0
    gave_up: bool = False
    recorded: bool = False
    curve: tuple[tuple[int, float], ...] = ()


class TuningQuality(_Closed):
    """What tuning all scales end to end did.

    kl_before, kl_after: KL on held-out calibration sequences, nats per token; `kept` says whether
    the tuned scales were. texts: KL before and after on texts that no choice depends on.
    """

    kl_before: float
    kl_after: float
    kept: bool
    texts: dict[str, tuple[float, float]] = {}
    seconds: float
    steps: int
    best_step: int
    rollbacks: int
    gave_up: bool
    curve: tuple[tuple[int, float], ...] = ()


class CheckedMap(_Closed):
    """A map that was measured on held-out windows before one was taken: quantized in haste, or
    refined as the result is where its method ends in "refined".

    bits: as in the budget. predicted_loss: by the profile; kl: measured, nats per token.
    """

    method: str
    bits: float
    predicted_loss: float
    kl: float
    kl_se: float
    taken: bool


class QualityReport(_Closed):
    """`quality.json` of a packed checkpoint.

    blocks, tuning: what learning did, where the refinement learns. resumed: both are the report of
    the job whose parameters this one took over; it trained nothing itself. begins: the special
    tokens that windows begin with, for "calibration" and "evaluation". checks: the maps of which
    the taken one lost least.
    seconds: wall time of each stage of the attempt that finished.
    """

    schema_version: Literal[1] = 1
    rows: tuple[QualityRow, ...]
    predicted_loss: float | None = None
    linears: tuple[LinearResult, ...] = ()
    blocks: tuple[BlockQuality, ...] = ()
    tuning: TuningQuality | None = None
    resumed: bool = False
    begins: dict[str, str] = {}
    checks: tuple[CheckedMap, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = {}

    def row(self, method: str) -> QualityRow:
        """The row of this method; KeyError names the rows there are."""
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(f"{method!r}; the report has {[row.method for row in self.rows]}")

    def to_json(self) -> str:
        """JSON text with two spaces of indent."""
        return json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> QualityReport:
        """Read a report; raises `FormatError` naming the file."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FormatError(f"{absent(path)}: give a folder that Bitmill has packed") from error
        except (OSError, ValueError) as error:
            raise FormatError(f"{path.name} is not a quality report: {reason(error)}") from error
