"""Settings of method "normtweaking". Torch-free."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from bitmill.config.methods import GPTQ, LearningNeeds, MethodConfig


class NormTweaking(MethodConfig):
    """GPTQ, then each block's norms are learned against the source.

    passes: over the calibration sequences. learning_rate: of Adam. windows: sequences of a
    step. The rest is as in `GPTQ`; without its correction for the prefix, which the learning sees
    itself.
    """

    name: ClassVar[str] = "normtweaking"
    solver: ClassVar[str] = "bitmill.refinement.normtweaking.learner:first_solver"
    learner: ClassVar[str | None] = "bitmill.refinement.normtweaking.learner:NormLearning"
    max_devices: ClassVar[int | None] = 1
    drops: ClassVar[bool] = True

    passes: int = Field(default=3, ge=0, le=1000)
    learning_rate: float = Field(default=3e-4, gt=0, le=1)
    windows: int = Field(default=4, ge=1, le=256)
    clip_search: bool = True
    compensated_grid: bool = True
    scale_refit: bool = True

    @property
    def first(self) -> GPTQ:
        """The method of the first solution."""
        return GPTQ(
            clip_search=self.clip_search,
            compensated_grid=self.compensated_grid,
            scale_refit=self.scale_refit,
            asymmetric=False,
        )

    @property
    def learning(self) -> LearningNeeds | None:
        return LearningNeeds(0, self.windows)
