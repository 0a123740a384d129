"""Keywords of the library's functions as a configuration. Torch-free.

A keyword is a field of `QuantizationConfig` (`refinement=GPTQ(asymmetric=False)`), or a field of
one of its parts by its own name (`bits`, `order`, `held_out`), with the part before it where two
parts have one of that name (`calibration_length`, `evaluation_length`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bitmill.config.closed import Closed
from bitmill.config.effort import with_effort
from bitmill.config.methods import MethodConfig
from bitmill.config.quantization import (
    KINDS,
    Allocation,
    Budget,
    Calibration,
    Evaluation,
    QuantizationConfig,
    Refinement,
    parse_config,
)
from bitmill.config.references import read_map, text_reference
from bitmill.errors import ModelError, SpecError

PARTS: dict[str, type[Closed]] = {
    "budget": Budget,
    "allocation": Allocation,
    "refinement": Refinement,
    "calibration": Calibration,
    "evaluation": Evaluation,
}


def configuration(
    base: QuantizationConfig | None, settings: Mapping[str, Any]
) -> QuantizationConfig:
    """The configuration `base` with these keywords in place of its own values.

    Raises `SpecError` naming the keyword, or the field whose value is illegal.
    """
    asked = {} if base is None else _json(base)
    if base is not None and "effort" in settings:
        asked = _undecided(base, asked)
    return parse_config(gathered(settings, QuantizationConfig.model_fields, asked))


def _undecided(base: QuantizationConfig, asked: dict[str, Any]) -> dict[str, Any]:
    """The JSON `asked` of `base` without what its effort stood for."""
    left = {name: part for name, part in asked.items() if name != "refinement"}
    if parse_config(left).refinement == base.refinement:
        asked = left
    given = asked.get("calibration", {})
    left = {**asked, "calibration": {k: v for k, v in given.items() if k != "sequences"}}
    return left if with_effort(left)["calibration"] == given else asked


def gathered(
    settings: Mapping[str, Any], names: Iterable[str], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """JSON of the fields `names` of a configuration: of `base`, with what keywords say over it.

    Raises `SpecError` for a keyword that sets none of them, and for one that could set two.
    """
    known = tuple(names)
    places = _places([name for name in known if name in PARTS])
    asked = dict(base or {})
    asked |= {name: _whole(name, value) for name, value in settings.items() if name in known}
    if "budget" not in settings and names_budget(settings):
        asked["budget"] = {}
    for name, value in settings.items():
        if name not in known:
            part, field = _place(name, places, known)
            asked[part] = dict(asked.get(part, {})) | {field: value}
    return {name: _read(name, value) for name, value in asked.items()}


def names_budget(settings: Mapping[str, Any]) -> bool:
    """Whether a keyword gives a limit of its own."""
    return any(name.removeprefix("budget_") in KINDS for name in settings)


def model_files(model: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Folder of a source model, and the name of the GGUF file in it where one was named.

    model: a folder of safetensors, or a GGUF file. Raises `ModelError` where there is none.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if not path.is_dir():
        what = "is no GGUF file" if path.is_file() else "is not there"
        raise ModelError(
            f"model {path} {what}: give a folder of safetensors, or a .gguf file",
            code="model_not_found",
            param="model",
        )
    return path, None


def _places(parts: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Keyword -> the part and field that it may mean."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in parts:
        for field in PARTS[part].model_fields:
            for name in (field, f"{part}_{field}"):
                found.setdefault(name, []).append((part, field))
    return found


def _place(
    name: str, places: Mapping[str, list[tuple[str, str]]], known: tuple[str, ...]
) -> tuple[str, str]:
    meant = places.get(name, [])
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise SpecError(
            f"setting {name!r} may mean several: give "
            + " or ".join(f"{part}_{field}" for part, field in meant),
            code="ambiguous_setting",
            param=name,
        )
    near = get_close_matches(name, [*known, *places], n=1)
    raise SpecError(
        f"there is no setting {name!r}: "
        + (f"did you mean {near[0]!r}?" if near else "docs/library.md lists them"),
        code="unknown_setting",
        param=name,
    )


def _json(config: BaseModel) -> dict[str, Any]:
    return {name: _whole(name, getattr(config, name)) for name in config.model_fields_set}


def _whole(name: str, value: Any) -> Any:
    """A part as a dict: its object, a dict, or a method's object or name for what has methods."""
    if isinstance(value, MethodConfig):
        value = Refinement.of(value)
    if isinstance(value, BaseModel):
        given = value.model_fields_set
        return {key: inner for key, inner in value.model_dump().items() if key in given}
    if isinstance(value, str) and name in PARTS and "method" in PARTS[name].model_fields:
        return {"method": value}
    return value


def _read(name: str, value: Any) -> Any:
    """A part with the files read that it names, as the command line reads them."""
    if not isinstance(value, Mapping):
        return value
    text, widths = value.get("text"), value.get("map")
    if name == "calibration" and isinstance(text, str | os.PathLike):
        return {**value, "text": text_reference(os.fspath(text))}
    if name == "allocation" and isinstance(widths, str | os.PathLike):
        return {**value, "map": read_map(Path(widths))}
    return value
