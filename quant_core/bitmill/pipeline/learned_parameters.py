"""What learned parameters in a published folder were learned for. Torch-free.

The parameters are the packed tensors themselves: roundings are the codes, beside them lie scales
and zero points, and clipping strengths are the range that those two span. A folder that learned
holds `learned_parameters.json` too; a job that names the folder as `resume_parameters` takes the
parameters over (`resume.py`) where model, settings and map are the same, and trains nothing. That
is what OmniQuant's `--epochs 0 --resume` does with clipping factors; codes give the same bytes on
every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.quantization import QuantizationConfig, Refinement
from bitmill.errors import FormatError, InputError, reason
from bitmill.io.atomic import sha256_file
from bitmill.io.manifest import Manifest, read_manifest

RECORD_NAME = "learned_parameters.json"
PARAM = Refinement.place("resume_parameters")


class LearnedFor(BaseModel):
    """`learned_parameters.json`: digests of model and calibration windows, and the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str
    calibration: str
    seed: int
    refinement: Refinement

    @classmethod
    def of_job(cls, config: QuantizationConfig, *, model: str, calibration: str) -> LearnedFor:
        """What a job of this configuration learns for."""
        asked = config.refinement.afresh()
        return cls(model=model, calibration=calibration, seed=config.seed, refinement=asked)

    @classmethod
    def parse(cls, data: bytes) -> LearnedFor:
        """Raises FormatError for what is no such record."""
        try:
            return cls.model_validate_json(data)
        except ValueError as error:
            raise FormatError(
                f"{RECORD_NAME} cannot be read: {reason(error)}", param=PARAM
            ) from error

    def check(self, asked: LearnedFor) -> None:
        """Refuse a job with other settings, of another model or on other calibration windows."""
        pairs = zip(_settings(self), _settings(asked), strict=True)
        for (name, there), (_, here) in pairs:
            if there != here:
                raise _unfit(f"{name} {there!r}, the job asks for {here!r}")
        if self.model != asked.model:
            raise _unfit("another model: its files differ from this job's")
        if self.calibration != asked.calibration:
            raise _unfit(
                "other calibration windows: text, tokenizer, sequences, length or held_out differ"
            )


@dataclass(frozen=True)
class LearnedParameters:
    """A published folder with learned parameters whose lists were read; `check_files` reads all."""

    folder: Path = field(compare=False)
    learned_for: LearnedFor
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> LearnedParameters:
        """Raises FormatError where the folder holds no learned parameters."""
        record = folder / RECORD_NAME
        if not record.is_file():
            raise FormatError(
                f"{folder.name} holds no {RECORD_NAME}: give the folder that a job whose "
                "refinement learns published",
                code="no_learned_parameters",
                param=PARAM,
            )
        return cls(folder, LearnedFor.parse(record.read_bytes()), read_manifest(folder))

    def check_map(self, bit_widths: BitWidthMap) -> None:
        """Refuse another map than the one that the parameters were learned for."""
        learned = BitWidthMap.load(self.folder / MAP_NAME)
        if learned == bit_widths:
            return
        names = sorted({*learned.linears, *bit_widths.linears})
        differ = (n for n in names if learned.linears.get(n) != bit_widths.linears.get(n))
        where = next(differ, f"column order {learned.order!r}")
        raise _unfit(
            f"another bit-width map, which differs at {where}: give the map that lies beside them "
            "by allocation method 'map'"
        )

    def check_files(self) -> None:
        """Refuse a folder in which a byte of a published file changed."""
        for path, entry in self.manifest.files.items():
            file = self.folder / path
            if not file.is_file() or sha256_file(file) != entry.sha256:
                raise FormatError(
                    f"learned parameters are damaged: {path} of {self.folder.name} is missing or "
                    "has another SHA-256 than when it was published; fetch the folder again",
                    code="damaged_parameters",
                    param=PARAM,
                )


def _unfit(problem: str) -> InputError:
    return InputError(
        f"learned parameters do not fit: they were learned for {problem}",
        code="unfit_parameters",
        param=PARAM,
    )


def _settings(learned_for: LearnedFor) -> Iterator[tuple[str, Any]]:
    yield from _leaves(learned_for.model_dump(mode="json", include={"seed", "refinement"}))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no object, with its dotted name, in the order of the fields."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value
