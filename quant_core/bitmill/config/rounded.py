"""Baselines of `evaluation` that are the result with something rounded while it runs. Torch-free.

    cache-BITS                 keys and values, 8, 4 or 2 bits
    activations-BITS           inputs of quantized linears, 8 or 4 bits
    activations-BITS-RULE      the same with another grid, or with what a rule leaves in 16 bits
    activations-fp8            the same in E4M3

A rule (`evaluation/activations/rule.py`) is found by name in `ACTIVATION_RULES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from bitmill.registry import Registry

ACTIVATION_RULES: Registry[Any] = Registry(
    "rule of activations",
    "bitmill.activation_rules",
    {
        "absmax": "bitmill.evaluation.activations.absmax:AbsMax",
        "llmint8": "bitmill.evaluation.activations.llmint8:LLMInt8",
        "quik": "bitmill.evaluation.activations.quik:QUIK",
        "static": "bitmill.evaluation.activations.static:Static",
    },
)
"""Name -> the `ActivationRule`."""

OBSERVING_RULES = frozenset({"static"})
"""Those of Bitmill for which the calibration windows are run first."""

ACTIVATION_BITS, CACHE_BITS = (8, 4), (8, 4, 2)


@dataclass(frozen=True)
class Rounded:
    """What is rounded, and to how many bits.

    fp8: to E4M3 instead of integers. rule: of activations, by name.
    """

    what: Literal["activations", "cache"]
    bits: int
    fp8: bool = False
    rule: str | None = None

    def __str__(self) -> str:
        """As a report calls it."""
        told = f"{'fp8' if self.fp8 else f'{self.bits}-bit'} {self.what}"
        return told if self.rule is None else f"{told} ({self.rule})"


@lru_cache(maxsize=1)
def rounded_baselines() -> dict[str, Rounded]:
    """All of them by name."""
    found = {f"activations-{bits}": Rounded("activations", bits) for bits in ACTIVATION_BITS}
    found["activations-fp8"] = Rounded("activations", 8, fp8=True)
    found |= {
        f"activations-{bits}-{rule}": Rounded("activations", bits, rule=rule)
        for rule in ACTIVATION_RULES.names()
        for bits in ACTIVATION_BITS
    }
    return found | {f"cache-{bits}": Rounded("cache", bits) for bits in CACHE_BITS}
