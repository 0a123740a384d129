"""`effort`: one word for what a job may leave open of refinement and calibration. Torch-free.

It fills fields that are not given, before anything is checked, so a stored specification holds what
the word stood for and means the same when the word is given another meaning.
docs/refinement.md has the time and the gain of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

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

WINDOWS = 160
"""Calibration windows of `CODED["best"]`, where nothing is said of them and `_has_windows`."""
BUNDLED = {"source": "bundled", "name": "wiki_calibration"}
"""The text of a calibration that names none. It has 212 windows of `LONGEST` tokens with the
tokenizer of Gemma 3, the fewest known."""
LONGEST, HELD_OUT = 2048, 16
"""Tokens of a window, and windows held out, of a calibration that does not say."""
MOST_HELD_OUT = 48
"""With more, the text might not have as many as are asked of it."""


def with_effort(data: Any) -> Any:
    """The JSON of a specification, with what its `effort` says of fields that it lacks.

    A method that is given keeps its own defaults where it is not the effort's; with several
    devices the effort's method gives way to GPTQ where it works on one alone. A refinement that is
    an object is complete, and so is a calibration. Anything but a mapping with a known effort is
    returned as it is, for the parser to refuse.
    """
    if not isinstance(data, Mapping):
        return data
    effort = data.get("effort", "fast")
    if not isinstance(effort, str) or effort not in EFFORTS:
        return data
    given = data.get("refinement", {})
    if not isinstance(given, Mapping):
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
    filled = {**data, "refinement": _filled(given, settings)}
    calibration = data.get("calibration", {})
    if settings is CODED["best"] and _has_windows(calibration):
        filled["calibration"] = {**calibration, "sequences": WINDOWS}
    return filled


def _has_windows(calibration: Any) -> bool:
    """Whether the number of windows is open, and the text has `WINDOWS` and those held out."""
    if not isinstance(calibration, Mapping) or "sequences" in calibration:
        return False
    text = calibration.get("text", BUNDLED)
    if isinstance(text, BaseModel):
        text = text.model_dump()
    framing = calibration.get("framing")  # a chat template leaves fewer windows of a text
    length, held_out = calibration.get("length", LONGEST), calibration.get("held_out", HELD_OUT)
    return (
        isinstance(text, Mapping)
        and BUNDLED | dict(text) == BUNDLED
        and framing != "chat"
        and isinstance(length, int)
        and length <= LONGEST
        and isinstance(held_out, int)
        and held_out <= MOST_HELD_OUT
    )


def _filled(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the settings that it lacks, inner mappings too."""
    filled = dict(given)
    for key, value in settings.items():
        if key not in filled:
            filled[key] = value
        elif isinstance(value, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], value)
    return filled
