"""`effort`: one word for the settings of refinement that a job may leave open. Torch-free.

It fills fields that are not given, before anything is checked, so a stored specification holds what
the word stood for and means the same when the word is given another meaning.
docs/refinement.md has the time and the gain of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from bitmill.config.codes import AUTO, CODES
from bitmill.config.methods import GPTQ, METHODS, OmniQuant

Effort = Literal["fast", "balanced", "best"]

LEARNED = OmniQuant.name
"""Where the JSON of a refinement has what is learned."""

EFFORTS: dict[str, Mapping[str, Any]] = {
    "fast": {"method": GPTQ.name},
    "balanced": {"method": OmniQuant.name, LEARNED: {"epochs": 4, "tune_scales_steps": 150}},
    "best": {"method": OmniQuant.name, LEARNED: {"epochs": 12, "tune_scales_steps": 300}},
}
"""Settings of refinement by effort."""

CODED: dict[str, Mapping[str, Any]] = {
    "fast": EFFORTS["fast"],
    "balanced": EFFORTS["fast"],
    "best": {"method": OmniQuant.name, LEARNED: {"tune_scales_steps": 100}},
}
"""The same for other codes than affine ones."""


def with_effort(data: Any) -> Any:
    """The JSON of a specification, with what its `effort` says of fields that it lacks.

    A method that is given keeps its own defaults where it is not the effort's; with several
    devices the effort's method gives way to GPTQ where it works on one alone. Anything but a
    mapping with a known effort is returned as it is, for the parser to refuse.
    """
    if not isinstance(data, Mapping):
        return data
    effort = data.get("effort", "fast")
    if not isinstance(effort, str) or effort not in EFFORTS:
        return data
    given = data.get("refinement", {})
    if not isinstance(given, Mapping):  # an object that was made before, in full
        return data
    elsewhere = [code.format for name, code in CODES.items() if name != AUTO]
    coded = data.get("code", AUTO) not in ("auto", AUTO) or data.get("format") in elsewhere
    settings = (CODED if coded else EFFORTS)[effort]
    most = METHODS[settings["method"]].max_devices
    devices = data.get("devices", 1)
    if most is not None and isinstance(devices, int) and devices > most:
        settings = EFFORTS["fast"]
    if given.get("method", settings["method"]) != settings["method"]:
        return data
    return {**data, "refinement": _filled(given, settings)}


def _filled(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the settings that it lacks, inner mappings too."""
    filled = dict(given)
    for key, value in settings.items():
        if key not in filled:
            filled[key] = value
        elif isinstance(value, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], value)
    return filled
