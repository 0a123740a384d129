"""Bit-width maps that others have made: a folder of them, and which fit a model. Torch-free.

A folder holds maps as JSON and files published with SliM-LLM (`.pt`), which are read without
executing anything in them. A map may say itself which model it is of (`made_for`), or `zoo.json`:

    {"schema_version": 1,
     "maps": {"a.json": {"shape": "<hex>", "weights": "<hex>", "model": "org/name"}}}

A map of the same weights is as good as one's own; one of the same shape is of a fine-tune or its
base; any other fits where it has a width for every group of linears that the model has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.closed import Closed
from bitmill.config.made_for import MadeFor
from bitmill.config.quantization import parse_part
from bitmill.config.slim_llm import read_slim_map
from bitmill.errors import FormatError, InputError
from bitmill.io.atomic import read_json
from bitmill.plan.architectures import architecture
from bitmill.plan.fingerprint import Fingerprint
from bitmill.plan.model_plan import Plan

INDEX_NAME = "zoo.json"
MOST_BYTES = 64 << 20
"""Of one map's file; larger ones are no maps."""
Match = Literal["weights", "shape", "fits"]


class Index(Closed):
    """`zoo.json`: maps by file name."""

    schema_version: Literal[1] = 1
    maps: dict[str, MadeFor] = Field(default={})


@dataclass(frozen=True)
class Found:
    """A map that can be applied to the model; bits: mean width over groups."""

    file: str
    match: Match
    bits: float
    model: str | None


def find_maps(folder: Path, model: Fingerprint, plan: Plan) -> list[Found]:
    """The maps of a folder that fit a model, the nearest first.

    Files that hold no map are passed over. Raises `SpecError` for a damaged `zoo.json`.
    """
    place = folder / INDEX_NAME
    index = parse_part(Index, read_json(place)) if place.is_file() else Index()
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".pt") or path.name == INDEX_NAME:
            continue
        try:
            bit_widths = _read(path, plan)
            check_fits(bit_widths, plan)
        except InputError:
            continue
        entry = index.maps.get(path.name) or bit_widths.made_for or MadeFor()
        groups = [width for widths in bit_widths.linears.values() for width in widths]
        mean = sum(groups) / len(groups)
        found.append(Found(path.name, match_of(model, entry), mean, entry.model))
    order: tuple[Match, ...] = ("weights", "shape", "fits")
    return sorted(found, key=lambda one: (order.index(one.match), one.file))


def match_of(model: Fingerprint, entry: MadeFor) -> Match:
    """How near the model that a map is of is to this one."""
    if model.weights is not None and model.weights == entry.weights:
        return "weights"
    return "shape" if model.shape == entry.shape else "fits"


def check_fits(bit_widths: BitWidthMap, plan: Plan) -> None:
    """Raise `FormatError` naming the first linear that the model has not, or not of this size, and
    for a map of no linears."""
    if not bit_widths.linears:
        raise FormatError("the map has no linears")
    shapes = {shape.name: shape for shape in plan.shapes}
    for name, widths in bit_widths.linears.items():
        shape = shapes.get(name)
        if shape is None:
            raise FormatError(f"the map has {name}, which the model has not", param=name)
        if len(widths) != shape.groups:
            raise FormatError(
                f"the map has {len(widths)} groups for {name}, whose {shape.columns} columns are "
                f"{shape.groups}",
                param=name,
            )


def _read(path: Path, plan: Plan) -> BitWidthMap:
    if path.stat().st_size > MOST_BYTES:
        raise FormatError(f"{path.name} is larger than {MOST_BYTES:,} bytes")
    if path.suffix == ".pt":
        return read_slim_map(path, prefix=f"{architecture(plan.model_type).blocks}.{{i}}.")
    return BitWidthMap.load(path)
