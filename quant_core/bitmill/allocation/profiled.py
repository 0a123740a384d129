"""A profile with the plan of the model it was made for: all that spending a budget needs.

Stored as a folder, so the model's own files are not needed any more. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bitmill.allocation.allocator import Allocator, CurvePoint
from bitmill.allocation.profile import PROFILE_NAME, SensitivityProfile
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.closed import Closed
from bitmill.config.codes import DEFAULT_WIDTHS
from bitmill.config.made_for import MADE_FOR_NAME, MadeFor
from bitmill.config.quantization import Allocation, Budget, parse_part
from bitmill.errors import SpecError
from bitmill.formats.accounting import footprint
from bitmill.io.atomic import atomic_folder, read_json, write_bytes
from bitmill.plan.model_plan import PLAN_NAME, Plan


class Allocated(Closed):
    """A map, what it takes in the units of all budgets, and what it is predicted to cost.

    predicted_loss: increase of the loss, nats per token; None where the profile has no costs.
    """

    map: BitWidthMap
    code_bits: float
    bits: float
    size: int
    predicted_loss: float | None

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        loss = "" if self.predicted_loss is None else f", predicted loss {self.predicted_loss:+.5f}"
        return (
            f"Allocated({len(self.map.linears)} linears, {self.bits:.4f} bits "
            f"({self.code_bits:.4f} code bits), {self.size:,} bytes{loss})"
        )


@dataclass(frozen=True)
class ProfiledModel:
    """What was measured of a model, by group and width. made_for: the model, where it is known."""

    profile: SensitivityProfile
    plan: Plan
    made_for: MadeFor | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read the folder; raises `FormatError` where it is damaged."""
        stored = read_json(Path(folder, PLAN_NAME))
        profile = SensitivityProfile.load(Path(folder))
        return cls(profile, parse_part(Plan, stored), MadeFor.beside(Path(folder)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder, which appears whole."""
        with atomic_folder(Path(folder)) as made:
            self.profile.save(made / PROFILE_NAME)
            write_bytes(made / PLAN_NAME, self.plan.model_dump_json(indent=1).encode())
            if self.made_for is not None:
                write_bytes(made / MADE_FOR_NAME, self.made_for.to_json().encode())

    def __repr__(self) -> str:
        return (
            f"ProfiledModel({self.plan.model_type}, {len(self.plan.matrices)} linears, widths "
            f"{list(self.profile.widths)}, id {self.profile.key[:12]})"
        )

    def allocator(self, asked: Mapping[str, Any]) -> Allocator:
        """Serves any number of budgets; asked: JSON of `Allocation`, else as the profile was made.

        Raises `SpecError` where it asks for other groups than the profile has.
        """
        measured = {
            "order": "activation" if self.profile.orders else "natural",
            "embeddings": "quantize" if self.plan.embeddings else "keep",
            "keep": self.profile.origin.config.keep or (),
        }
        given = parse_part(Allocation, asked).model_dump(exclude_unset=True)
        for name, value in measured.items():
            if given.get(name, value) != value:
                raise SpecError(
                    f"allocation.{name} is {given[name]!r} but the profile was made with "
                    f"{value!r}, which decides its groups: leave it out, or make another profile",
                    param=f"allocation.{name}",
                )
        own = {"method": "knapsack" if self.profile.widths else "sba"} | measured | given
        if own["method"] == "map":
            raise SpecError(
                "a given map leaves nothing to allocate: ask for knapsack, sba or uniform",
                param="allocation.method",
            )
        usual = tuple(width for width in DEFAULT_WIDTHS if width in self.profile.widths)
        allocation = parse_part(Allocation, {"widths": usual or DEFAULT_WIDTHS} | own)
        return Allocator(self.plan, allocation, self.profile)

    def allocate(self, budget: Budget, allocator: Allocator | None = None) -> Allocated:
        """The map for a budget; raises `BudgetError` and `SpecError` like a job would."""
        found = (allocator or self.allocator({})).map(budget)
        taken = footprint(self.plan, found)
        costs = bool(self.profile.widths)
        return Allocated(
            map=found.of(self.made_for),
            code_bits=taken.code_bits,
            bits=taken.bits,
            size=taken.size,
            predicted_loss=self.profile.predicted(found) if costs else None,
        )

    def curve(self, points: int = 32) -> list[CurvePoint]:
        """Maps from the smallest to the largest stored size, evenly spaced in bytes."""
        return self.allocator({}).curve(points)
