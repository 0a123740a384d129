"""A packed folder in another format, as its headers tell it: every tensor, bytes, refusals.

Torch-free: the service plans an export before it has a job, and a quantization that is to be
exported before it runs. What writes it is `pipeline/export.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from bitmill.config.closed import Closed
from bitmill.config.codes import AUTO, DEFAULT_WIDTHS
from bitmill.config.quantization import ORDER, BaseAllocation, FormatName
from bitmill.errors import SpecError
from bitmill.formats.format import Contents, Facts, Format, check_supported, parse_format
from bitmill.formats.headers import Headers
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.config_json import CONFIG_FILE, check_config, sanitize
from bitmill.plan.model_plan import Plan, build_plan

MOST_EXPORTS = 16
"""That a job may name."""


class ExportTarget(Closed):
    """A format to write a packed folder in, and the format's settings."""

    format: FormatName
    settings: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _known(self) -> Self:
        try:
            _ = self.chosen
        except SpecError as error:
            raise ValueError(error.message) from error
        return self

    @property
    def chosen(self) -> Format:
        """The format with these settings. Raises `SpecError` naming an unknown one."""
        return parse_format(self.format, self.settings)


class ExportReport(Closed):
    """What is written: bytes of all files that hold tensors, and of those of the packed folder."""

    format: str
    linears: int
    tensors: int
    file_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class ExportPlan:
    """A packed folder that can be written in a format; nothing is written yet."""

    folder: Path
    chosen: Format
    stored: Headers
    contents: Contents
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, chosen: Format, stored: Headers) -> Self:
        """Plan it from config and headers; stored: what the folder says of itself.

        Raises `SpecError` (format_refuses) naming all that the format has no place for, and
        FormatError for a folder that is not packed.
        """
        settings = sanitize(read_json(folder / CONFIG_FILE))
        settings.pop("quantization_config")
        bit_widths = stored.bit_widths
        plan = plan_of(stored, settings)
        contents = Contents.of(plan, bit_widths, settings)
        if chosen.name == stored.format.name:
            raise SpecError(f"{folder.name} is in format {chosen.name!r} already", param="format")
        check_supported(chosen, Facts.of(contents, settings, stored.kinds, stored.rewrites))
        return cls(folder, chosen, stored, contents, settings)

    @cached_property
    def tensors(self) -> list[TensorInfo]:
        """Every tensor that will be written, with its bytes."""
        return self.chosen.tensors(self.contents)

    def report(self) -> ExportReport:
        """What will be written."""
        return ExportReport(
            format=self.chosen.name,
            linears=len(self.contents.plan.matrices),
            tensors=len(self.tensors),
            file_bytes=self.chosen.file_bytes(self.contents),
            packed_bytes=self.stored.file_bytes,
        )


def plan_of(stored: Headers, settings: Mapping[str, Any]) -> Plan:
    """The plan of the model that a packed folder was made from.

    settings: its config.json without quantization_config. Sources of linears are their names in
    transformers' module tree.
    """
    config = dict(settings)
    found = check_config(config)
    parameters = found.parameters(config).shapes
    linears = stored.bit_widths.linears
    kept = stored.kept
    vectors = (tensor.dtype for tensor in kept if len(tensor.shape) == 1)  # never narrowed
    dtype = next((dtype for dtype in vectors if dtype in ("BF16", "F16")), "F32")
    names = [f"{name}.weight" for name in linears]
    weights = [TensorInfo(name, dtype, parameters[name]) for name in names]
    inside = f"{found.blocks}."
    embeddings = any(not name.startswith(inside) for name in linears)
    matrices = [name.removesuffix(".weight") for name, s in parameters.items() if len(s) == 2]
    keep = tuple(name for name in matrices if name not in linears)
    allocation = BaseAllocation(
        keep=keep, embeddings="quantize" if embeddings else "keep", kept_dtype="source"
    )
    plan = build_plan(config, found, [*kept, *weights], allocation)
    return plan.model_copy(update={"format": stored.format.name})


def with_exports(data: Any) -> Any:
    """The JSON of a specification, with what its `exports` need of an allocation that leaves it
    open: the model's own column order, and widths that all of them take.

    Anything that is not such a mapping is returned as it is, for the parser to refuse.
    """
    exports = data.get("exports") if isinstance(data, Mapping) else None
    if not isinstance(exports, list | tuple) or not 0 < len(exports) <= MOST_EXPORTS:
        return data
    given = data.get("allocation", {})
    try:
        formats = [ExportTarget.model_validate(one).chosen for one in exports]
    except ValidationError:
        return data
    if not isinstance(given, Mapping):  # an object that was made before, in full
        return data
    filled = dict(given)
    if any(one.rewrites is not None and ORDER not in one.rewrites for one in formats):
        filled.setdefault("order", "natural")
    taken = tuple(w for w in DEFAULT_WIDTHS if all(one.takes(w) for one in formats))
    if taken != DEFAULT_WIDTHS and data.get("code", AUTO) in ("auto", AUTO):
        filled.setdefault("widths", taken)
    return {**data, "allocation": filled}
