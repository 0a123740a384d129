"""Refinement methods by name: their settings, and what else must be known of them. Torch-free.

A method is a solver, which gives every linear its codes (`solvers/solver.py`), and for some a
learner, which then trains each decoder block (`refinement/learner.py`). Nothing outside asks for a
method's name: what the rest of the library must know of it, its configuration class says.
`METHODS` finds the classes; docs/extending.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from bitmill.config.closed import Closed
from bitmill.config.transforms import Rotation, TransformConfig
from bitmill.errors import SpecError
from bitmill.registry import Registry
from bitmill_kernels.trellis.layout import TILE

Statistic = Literal["hessian", "shift", "gradient"]
"""What may be collected for a solver: mean x x^T of a linear's inputs, with it what its outputs
lack for the already quantized prefix, on calibration and on held-out windows, and weights by which
tokens count in both and rows in a search (`calibration/loss_weights.py`)."""


@dataclass(frozen=True)
class LearningNeeds:
    """What learning holds of a block at once.

    bytes_per_weight: of the block. windows: calibration windows of one step. whole_model: bytes
    for every weight of the model too, at the end; 0 where it is not tuned. tuned_windows: that all
    steps of tuning see together.
    """

    bytes_per_weight: int
    windows: int
    whole_model: int = 0
    tuned_windows: int = 0


class MethodConfig(Closed):
    """Base of the settings of all methods.

    name: as users write it. solver: place of what makes the `Solver` from the settings. learner:
    place of the `Learner`, if the method has one. kind: of the tensors that it gives
    (`quant.tensors.KINDS`). max_devices: most accelerators that it works on, None for any number.
    tile: rows of a linear that are coded together, which devices do not divide.
    transformed: whether transforms other than the column order may come before it.
    folds: whether rows of its tensors may change places, so that column orders can be folded.
    grid: name of the grid that all its codes are on, for formats that hold no other; None for any.
    drops: whether groups may have width 0, which drops them. outliers: whether columns may be kept
    in 16 bits beside its codes.
    """

    name: ClassVar[str]
    solver: ClassVar[str]
    learner: ClassVar[str | None] = None
    kind: ClassVar[str] = "affine"
    max_devices: ClassVar[int | None] = None
    tile: ClassVar[int] = 1
    transformed: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    grid: ClassVar[str | None] = None
    drops: ClassVar[bool] = False
    outliers: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that its solver needs; of none, none are collected."""
        return frozenset({"hessian"})

    @property
    def runs_source(self) -> bool:
        """Whether the source model runs beside the quantized one."""
        return "shift" in self.needs or self.learner is not None

    @property
    def transforms(self) -> tuple[TransformConfig, ...]:
        """Those that always come before it, after those that a job asks for."""
        return ()

    @property
    def learning(self) -> LearningNeeds | None:
        """What learning holds, None where nothing is learned."""
        return None

    @property
    def judged(self) -> bool:
        """Whether held-out windows choose what is kept of learning, which takes at least one."""
        return False

    @property
    def resumed(self) -> Path | None:
        """Folder of the parameters that are taken over instead of learned."""
        return None

    def of_code(self, code: str) -> MethodConfig:
        """The same settings for a code of `config.codes.CODES`. Raises `SpecError` for one that the
        method has not."""
        if code == self.kind:
            return self
        raise SpecError(
            f"method {self.name!r} finds no codes of {code!r}: give method 'gptq' or 'rtn', or "
            f"code {self.kind!r}",
            param="code",
        )

    def lighter(self) -> Iterator[tuple[str, Any, Self]]:
        """The name of a setting, a value that needs less memory, and the settings with it."""
        yield from ()


class RTN(MethodConfig):
    """Round to nearest. clip_search: ranges are clipped where that lowers the error weighted by
    diag(H)."""

    name: ClassVar[str] = "rtn"
    solver: ClassVar[str] = "bitmill.solvers.rtn:RtnSolver.of"
    drops: ClassVar[bool] = True
    outliers: ClassVar[bool] = True

    clip_search: bool = True

    def of_code(self, code: str) -> MethodConfig:
        return TrellisRTN(**dict(self)) if code == TrellisRTN.kind else super().of_code(code)


class GPTQ(MethodConfig):
    """GPTQ, group by group.

    compensated_grid: the grid is searched by GPTQ's own loss after the clip search.
    scale_refit: closed-form refit of the scales and descent of the codes after the pass.
    asymmetric: correction for the already quantized prefix, kept per linear only where the error on
    held-out sequences falls.
    """

    name: ClassVar[str] = "gptq"
    solver: ClassVar[str] = "bitmill.solvers.gptq.solve:GptqSolver.of"
    drops: ClassVar[bool] = True
    outliers: ClassVar[bool] = True

    clip_search: bool = True
    compensated_grid: bool = True
    scale_refit: bool = True
    asymmetric: bool = True

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({"hessian", "shift"} if self.asymmetric else {"hessian"})

    def lighter(self) -> Iterator[tuple[str, Any, Self]]:
        if self.asymmetric:
            yield "asymmetric", False, self.model_copy(update={"asymmetric": False})

    def of_code(self, code: str) -> MethodConfig:
        return TrellisGPTQ(**dict(self)) if code == TrellisGPTQ.kind else super().of_code(code)


class _Trellis(MethodConfig):
    """What all methods that give trellis codes have in common."""

    kind: ClassVar[str] = "trellis"
    outliers: ClassVar[bool] = False
    tile: ClassVar[int] = TILE
    folds: ClassVar[bool] = False

    @property
    def transforms(self) -> tuple[TransformConfig, ...]:
        return (Rotation(),)


class TrellisRTN(_Trellis, RTN):
    """The best trellis codes of every tile alone."""

    solver: ClassVar[str] = "bitmill.solvers.trellis:TrellisSolver.of_rtn"


class TrellisGPTQ(_Trellis, GPTQ):
    """Trellis codes with feedback between tiles, tokens weighted by the loss gradient; settings of
    grids have no meaning there."""

    solver: ClassVar[str] = "bitmill.solvers.trellis:TrellisSolver.of_gptq"

    @property
    def needs(self) -> frozenset[Statistic]:
        return super().needs | {"gradient"}


class OmniQuant(MethodConfig):
    """Block-wise learning (OmniQuant, and past it), see `bitmill.refinement.omniquant.settings`.

    epochs, batch: passes over the calibration sequences and sequences per step; None takes the
    mode's own. tune_scales_steps: steps that tune all scales end to end, behind the last block.
    resume_parameters: take what a job with these very settings learned, and train nothing.

    It starts from rounding in mode "clipping", else from GPTQ without the correction for the
    prefix: learning sees the quantized prefix itself, and starts better without.
    """

    name: ClassVar[str] = "omniquant"
    solver: ClassVar[str] = "bitmill.refinement.omniquant.settings:first_solver"
    learner: ClassVar[str | None] = "bitmill.refinement.omniquant.model:ModelLearning"
    max_devices: ClassVar[int | None] = 1
    transformed: ClassVar[bool] = False
    drops: ClassVar[bool] = True

    mode: Literal["clipping", "scales", "rounding"] = "rounding"
    epochs: int | None = Field(default=None, ge=0, le=1000)
    batch: int | None = Field(default=None, ge=1, le=256)
    augmented_loss: bool = False
    tune_scales_steps: int = Field(default=0, ge=0, le=100_000)
    resume_parameters: Path | None = None
    clip_search: bool = True
    compensated_grid: bool = True
    scale_refit: bool = True

    @property
    def first(self) -> RTN | GPTQ:
        """The method of the first solution."""
        if self.mode == "clipping":
            return RTN(clip_search=self.clip_search)
        return GPTQ(
            clip_search=self.clip_search,
            compensated_grid=self.compensated_grid,
            scale_refit=self.scale_refit,
            asymmetric=False,
        )

    @property
    def learning(self) -> LearningNeeds | None:
        if self.resume_parameters is not None:
            return None
        steps = self.tune_scales_steps
        return LearningNeeds(30, self.batch or 4, bool(steps), 4 * steps)  # docs/omniquant.md

    @property
    def judged(self) -> bool:
        return self.resume_parameters is None

    @property
    def resumed(self) -> Path | None:
        return self.resume_parameters

    def lighter(self) -> Iterator[tuple[str, Any, Self]]:
        if self.tune_scales_steps:
            yield "tune_scales_steps", 0, self.model_copy(update={"tune_scales_steps": 0})

    def of_code(self, code: str) -> MethodConfig:
        if code != TrellisOmniQuant.kind:
            return super().of_code(code)
        if self.resume_parameters is not None:
            raise SpecError(
                f"learned parameters are taken over for code {self.kind!r} alone: leave them out, "
                "and the job learns",
                param="refinement.omniquant.resume_parameters",
            )
        return TrellisOmniQuant(**dict(self))


class TrellisOmniQuant(_Trellis, OmniQuant):
    """Trellis codes found with feedback, then scales of rows and groups, norms and biases tuned end
    to end. It has of `OmniQuant` `tune_scales_steps`, `batch` (of tuning) and `scale_refit`; blocks
    are not learned. Its first solution has the correction for the prefix."""

    learner: ClassVar[str | None] = "bitmill.refinement.omniquant.model:TrellisLearning"

    @property
    def first(self) -> RTN | GPTQ:
        return TrellisGPTQ(scale_refit=self.scale_refit)

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.first.needs

    @property
    def judged(self) -> bool:
        return self.tune_scales_steps > 0

    @property
    def learning(self) -> LearningNeeds | None:
        batch, steps = self.batch or 4, self.tune_scales_steps
        return LearningNeeds(0, batch, 2 * bool(steps), batch * steps)


BASELINE = GPTQ(compensated_grid=False, scale_refit=False, asymmetric=False)
"""What a result is compared with, at one width in natural column order."""

METHODS: Registry[type[MethodConfig]] = Registry(
    "refinement method",
    "bitmill.methods",
    {
        "rtn": "bitmill.config.methods:RTN",
        "gptq": "bitmill.config.methods:GPTQ",
        "hqq": "bitmill.solvers.hqq.settings:HQQ",
        "exllama": "bitmill.solvers.exllama.settings:ExLlama",
        "normtweaking": "bitmill.refinement.normtweaking.settings:NormTweaking",
        "omniquant": "bitmill.config.methods:OmniQuant",
    },
)
