"""What config and headers of a source model say, and what transforms of the source make of them.

A transform of the source is exact: it makes another model of the same function, of which the rest
of a job knows nothing more. Its headers are known without reading a weight, so a job is planned on
them; stage `resolve` writes the folder (`models/rewrite_source.py`). The folder's config.json, and
with it that of the result, lists the transforms under `RECORD`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from bitmill.config.transforms import TransformConfig
from bitmill.io.gguf import read_gguf_header
from bitmill.io.safetensors import TensorInfo, read_headers
from bitmill.plan.architectures import Architecture
from bitmill.plan.config_json import check_config, read_config, refuse_adapter, refuse_pickles
from bitmill.plan.gguf_models import read_model

RECORD = "source_transforms"


@dataclass(frozen=True)
class SourceModel:
    """What config and headers of a model say. settings: of a sanitized config.json."""

    settings: dict[str, Any]
    architecture: Architecture
    stored: tuple[TensorInfo, ...]


class SourceTransform(TransformConfig):
    """Base of the settings of transforms that rewrite the whole source model.

    `transform` names a `transforms.transform.SourceRewriting`.
    """

    of_source: ClassVar[bool] = True

    def rewritten(self, source: SourceModel) -> SourceModel:
        """Config and headers of the model that it makes. Raises `ModelError` for one that it cannot
        rewrite exactly."""
        raise NotImplementedError


def read_source(folder: Path, *, gguf: str | None = None) -> SourceModel:
    """Read a local model folder, or one GGUF file in it.

    Raises `ModelError` for files that are missing, unsafe, damaged or unsupported.
    """
    if gguf is not None:
        model = read_model(read_gguf_header(folder / gguf))
        parts = tuple(part.info for part in model.parts.values())
        return SourceModel(model.config, check_config(model.config), parts)
    refuse_adapter(folder)
    refuse_pickles(folder)
    settings, found = read_config(folder)
    return SourceModel(settings, found, tuple(read_headers(folder).values()))


def rewritten_source(source: SourceModel, transforms: Iterable[TransformConfig]) -> SourceModel:
    """What transforms of the source make of it, one after the other, with their record in the
    config."""
    for one in transforms:
        assert isinstance(one, SourceTransform), one.name
        source = one.rewritten(source)
        record = [*recorded(source.settings), {"name": one.name} | one.model_dump(mode="json")]
        source = replace(source, settings=source.settings | {RECORD: record})
    return source


def recorded(settings: dict[str, Any]) -> list[Any]:
    """The transforms that made the source of a model with this config.json, as they were asked
    for."""
    found = settings.get(RECORD, [])
    return found if isinstance(found, list) else []
