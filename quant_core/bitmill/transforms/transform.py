"""What finds rewrites: a transform looks at linears that read one input, before they are solved.

What it finds (`quant/rewrites.py`) is exact: the linear computes the same function, in columns that
are easier to quantize. It stays with the quantized weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from bitmill.config.transforms import TransformConfig
from bitmill.plan.model_plan import Source
from bitmill.plan.source_model import SourceModel
from bitmill.quant.rewrites import Rewrite, Rewrites
from bitmill.quant.tensors import Stored
from bitmill.registry import load_object
from bitmill.runtime.ranks import Ranks
from bitmill.transforms.channels import ChannelInputs


class Transform(Protocol):
    """What finds rewrites of linears that read one input."""

    def fit(
        self, weights: Mapping[str, Tensor], H: Tensor | None, ranks: Ranks
    ) -> Mapping[str, Rewrite]:
        """Rewrites by linear, of all that are given or of none.

        weights: full name -> f32 [n, K], this rank's rows of linears that read one input, in the
        columns that earlier transforms led to. H: f32 [K, K], mean x x^T of that input in the same
        columns, where the method needs "hessian". All rewrites must do the same to H.
        """


class ChannelScaling(Protocol):
    """What finds scales of input channels, which are folded away (`refinement/folding.py`)."""

    def scales(
        self,
        weights: Mapping[str, Tensor],
        widths: Mapping[str, tuple[int, ...]],
        inputs: ChannelInputs,
        ranks: Ranks,
    ) -> Tensor:
        """f32 [K] > 0: what columns are multiplied by, and their input is divided by.

        weights: full name -> f32 [N, K] of linears that read one input, in packed columns; widths:
        of their groups; inputs: what is known of that input, in the same columns. The same on all
        ranks.
        """


class SourceRewriting(Protocol):
    """What computes the model that a `plan.source_model.SourceTransform` says."""

    def tensors(
        self, source: SourceModel, read: Callable[[Source], Tensor]
    ) -> Callable[[str], Tensor]:
        """What gives a tensor of `SourceTransform.rewritten` by its name, in the dtype and shape
        said there. read: of the source's files; threads may ask at once."""


def together(names: Sequence[str], alike: Callable[[str], object]) -> list[list[str]]:
    """Names in lists of those of which `alike` says the same, in their sequence."""
    found: dict[object, list[str]] = {}
    for name in names:
        found.setdefault(alike(name), []).append(name)
    return list(found.values())


def made_of(settings: TransformConfig) -> Any:
    """The `Transform` of these settings; where it is folded the `ChannelScaling`, where it is of
    the source the `SourceRewriting`."""
    return load_object(settings.transform)(settings)


class SolvedModel(Protocol):
    """A model whose linears are solved, as it is to be packed."""

    def packed(self, name: str) -> Stored:
        """One linear or embedding."""

    def solved(self, name: str, packed: Stored) -> Stored:
        """The linear as it was solved, of what `packed` gives."""

    def rewrites(self, name: str) -> Rewrites:
        """The rewrites of one linear."""
