"""What a report needs of a sensitivity profile: `profile_summary.json` beside a packed checkpoint.

Costs are predicted increases of the model's loss in mean nats per token (`allocation/profile.py`).
The profile itself stays with the service; this file is small enough to travel. Torch-free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bitmill.allocation.allocator import CurvePoint, curve
from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.closed import Closed
from bitmill.config.quantization import Allocation
from bitmill.errors import FormatError, reason
from bitmill.formats.accounting import footprint
from bitmill.plan.model_plan import Plan

SUMMARY_NAME = "profile_summary.json"
_DIGITS = 4


class LinearSensitivity(Closed):
    """One linear. groups: cost of each group at the summary's reference width.

    predicted_loss: cost of the whole linear at the widths it was given.
    """

    groups: tuple[float, ...]
    predicted_loss: float


class ProfileSummary(Closed):
    """Sensitivities at one width, losses as allocated, and the size-loss curve."""

    schema_version: Literal[1] = 1
    profile_id: str
    reference_width: int
    linears: dict[str, LinearSensitivity]
    curve: tuple[CurvePoint, ...]

    def to_json(self) -> str:
        """JSON text with two spaces of indent."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> ProfileSummary:
        """Read a summary; raises `FormatError` naming the file."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FormatError(f"{path.name} is not a profile summary: {reason(error)}") from error


def summarize(
    plan: Plan,
    allocation: Allocation,
    profile: SensitivityProfile,
    bit_widths: BitWidthMap,
    *,
    points: int = 24,
) -> ProfileSummary | None:
    """Summary for the map that was allocated; None for a profile without costs of its widths.

    The reference width is the profiled one nearest to the map's mean.
    """
    used = {width for widths in bit_widths.linears.values() for width in widths}
    if not used | set(allocation.legal_widths) <= set(profile.widths):
        return None
    mean = footprint(plan, bit_widths).code_bits
    reference = min(profile.widths, key=lambda width: (abs(width - mean), width))
    column = profile.widths.index(reference)
    linears, own = {}, profile.keeping(bit_widths.outliers)
    for name, widths in bit_widths.linears.items():
        costs = own.linear(name).costs[:, column]
        linears[name] = LinearSensitivity(
            groups=tuple(_rounded(float(cost)) for cost in costs),
            predicted_loss=_rounded(own.predicted_loss({name: widths})),
        )
    return ProfileSummary(
        profile_id=profile.key,
        reference_width=reference,
        linears=linears,
        curve=tuple(curve(profile, plan, allocation, points)),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
