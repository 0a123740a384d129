"""Norm tweaking: factors and biases of a block's norms, learned behind its quantized linears.

    L = mean over channels of |mean y - mean y'| + |var y - var y'|

y, y' [tokens, D] are outputs of the quantized block behind the quantized prefix and of the source's
block in the source model; means and variances are over the tokens of a step. (Li et al., "Norm
Tweaking", arXiv 2309.02784, section 3.) Adam learns; the norms with the least mean (y - y')^2 on
held-out sequences, looked at after every epoch, are kept, the source's where none is better.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bitmill.calibration.windows import CalibrationSet
from bitmill.formats.writing import DTYPES
from bitmill.models.streamed import StreamedModel
from bitmill.quant.tensors import Quantized
from bitmill.refinement.learner import LearnedBlock
from bitmill.refinement.normtweaking.settings import NormTweaking
from bitmill.results import BlockQuality
from bitmill.runtime.process import deterministic
from bitmill.solvers.solver import Solver, solver_of


def first_solver(settings: NormTweaking) -> Solver:
    """The solver of the first solution."""
    return solver_of(settings.first)


@dataclass(frozen=True)
class TweakedBlock:
    """A `LearnedBlock` whose linears stayed as they were."""

    weights: Mapping[str, Quantized]
    report: BlockQuality


class NormLearning:
    """A `Learner` of norms; the linears keep their first solution."""

    def __init__(
        self,
        model: StreamedModel,
        quantized: StreamedModel,
        tokens: CalibrationSet,
        settings: NormTweaking,
        folder: Path,
        *,
        seed: int,
    ) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.count = len(tokens.tokens)

    @staticmethod
    def watched(tokenizer_folder: Path, tokens: CalibrationSet) -> Mapping[str, Tensor]:
        """No text beside the calibration's."""
        return {}

    def block(
        self,
        index: int,
        block: nn.Module,
        starts: Mapping[str, Quantized],
        inputs: Tensor,
        targets: Tensor,
    ) -> LearnedBlock:
        """See `Learner`."""
        started = time.perf_counter()
        norms = norms_of(self.model, index, block)
        held_out = slice(self.count, None) if len(inputs) > self.count else slice(None)
        curve = [(0, self._error(index, block, inputs[held_out], targets[held_out]))]
        best, kept = 0, [norm.clone() for norm, _ in norms]
        masters = [nn.Parameter(norm.detach().float().clone()) for norm, _ in norms]
        optimizer = torch.optim.Adam(masters, lr=self.settings.learning_rate)
        generator = torch.Generator().manual_seed(self.seed + index)
        step = 0
        for _ in range(self.settings.passes if norms else 0):
            order = torch.randperm(self.count, generator=generator)
            for windows in order.split(self.settings.windows):
                step += 1
                loss = self._distance(index, block, inputs[windows], targets[windows], norms)
                for master, gradient in zip(masters, loss, strict=True):
                    master.grad = gradient.float()
                optimizer.step()
                _install(norms, masters)
            curve.append((step, self._error(index, block, inputs[held_out], targets[held_out])))
            if curve[-1][1] < min(error for _, error in curve[:-1]):
                best, kept = step, [norm.clone() for norm, _ in norms]
        _install(norms, kept)
        report = BlockQuality(
            index=index,
            mode="norms",
            kept="learned" if best else "start",
            loss_before=curve[0][1],
            loss_after=min(error for _, error in curve),
            seconds=time.perf_counter() - started,
            steps=step,
            best_step=best,
            curve=tuple(curve),
        )
        return TweakedBlock(starts, report)

    def advance(self, index: int, block: nn.Module) -> None:
        """Nothing is carried from block to block."""

    def tune(
        self,
        weights: Mapping[str, Quantized],
        matrices: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor],
    ) -> None:
        """Nothing is tuned end to end."""
        return None

    def _distance(
        self,
        index: int,
        block: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        norms: Sequence[tuple[Tensor, torch.dtype]],
    ) -> tuple[Tensor, ...]:
        """Gradients of L with respect to the norms."""
        parameters = [norm for norm, _ in norms]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            with deterministic(), torch.enable_grad():
                output = self.model.run_block(index, block, inputs).float().flatten(0, 1)
                target = targets.to(output.device).float().flatten(0, 1)
                means = (output.mean(0) - target.mean(0)).abs()
                variances = (output.var(0) - target.var(0)).abs()
                return torch.autograd.grad((means + variances).mean(), parameters)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    @torch.no_grad()
    def _error(self, index: int, block: nn.Module, inputs: Tensor, targets: Tensor) -> float:
        """mean (y - y')^2."""
        total = 0.0
        for x, target in zip(inputs.split(1), targets.split(1), strict=True):
            output = self.model.run_block(index, block, x).float()
            total += float((output - target.to(output.device).float()).square().mean())
        return total / max(len(inputs), 1)


def norms_of(
    model: StreamedModel, index: int, block: nn.Module
) -> list[tuple[Tensor, torch.dtype]]:
    """Factors and biases of a block's norms, and the dtypes in which they are stored."""
    prefix, found = f"{model.plan.block_prefix}.{index}.", []
    for tensor in model.plan.tensors:
        parent, _, leaf = tensor.module.removeprefix(prefix).rpartition(".")
        if not tensor.module.startswith(prefix) or len(tensor.shape) != 1:
            continue
        module = block.get_submodule(parent)
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            found.append((getattr(module, leaf), DTYPES[tensor.spec.dtype]))
    return found


@torch.no_grad()
def _install(norms: Sequence[tuple[Tensor, torch.dtype]], values: Sequence[Tensor]) -> None:
    """Put values into the block, rounded as they will be stored."""
    for (norm, dtype), value in zip(norms, values, strict=True):
        norm.copy_(value.to(dtype))
