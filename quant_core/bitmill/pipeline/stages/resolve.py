"""Stage `resolve`: the source's files by SHA-256; a GGUF file becomes a folder of safetensors.

Where a job asks for transforms of the source, what they make of it is the source of all later
stages, and its digest names the transforms too.

Files count as unchanged while name, size and both times are; what they hold is hashed here, and all
later stages go by that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitmill.config.transforms import TransformConfig
from bitmill.io.atomic import sha256_file, sha256_json, write_json
from bitmill.io.companions import companions
from bitmill.io.safetensors import safetensors_files
from bitmill.models.convert_gguf import CONVERSION_VERSION, convert_gguf
from bitmill.models.rewrite_source import rewrite_source
from bitmill.pipeline.source import Source
from bitmill.pipeline.stage import Run, Stage, content
from bitmill.plan.config_json import refuse_pickles
from bitmill.plan.fingerprint import hash_weights

FILES_NAME = "files.json"
_CONVERTED, _REWRITTEN = "source", "rewritten"


@dataclass(frozen=True)
class FileState:
    """A file of the source, without its content. Times in ns; `changed` is the inode's."""

    name: str
    size: int
    modified: int
    changed: int


@dataclass(frozen=True)
class Inputs:
    """The folder's files, or its one GGUF file; conversion: the version of what is made of it.
    transforms: of the source."""

    folder: Path = field(compare=False)
    gguf: str | None
    files: tuple[FileState, ...]
    conversion: int | None
    transforms: tuple[TransformConfig, ...]

    @classmethod
    def of(
        cls, folder: Path, gguf: str | None, transforms: tuple[TransformConfig, ...] = ()
    ) -> Inputs:
        """What lies in a model folder now."""
        names = [gguf] if gguf is not None else sorted({*_files(folder), *companions(folder)})
        stats = [(name, (folder / name).stat()) for name in names]
        return cls(
            folder,
            gguf,
            tuple(FileState(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in stats),
            None if gguf is None else CONVERSION_VERSION,
            transforms,
        )


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Raises `ModelError` for files that are unsafe or damaged."""
    place = inputs.folder
    if inputs.gguf is None:
        refuse_pickles(place)
    else:
        place = folder / _CONVERTED
        convert_gguf(inputs.folder / inputs.gguf, place)
    tensors: dict[str, str] = {}
    weights = {path.name for path in safetensors_files(place)}
    digests = {}
    for i, file in enumerate(inputs.files, 1):
        path = inputs.folder / file.name
        if file.name in weights:
            digests[file.name], found = hash_weights(path)
            tensors |= found
        else:
            digests[file.name] = sha256_file(path)
        run.on_unit(i, len(inputs.files), "file", file.name)
    given = {f.name: {"size": f.size, "sha256": digests[f.name]} for f in inputs.files}
    if inputs.transforms:
        rewrite_source(place, folder / _REWRITTEN, inputs.transforms)
        place = folder / _REWRITTEN
    if place != inputs.folder:
        weights = {path.name for path in safetensors_files(place)}
        tensors = {k: v for name in weights for k, v in hash_weights(place / name)[1].items()}
        names = {*_files(place), *companions(place)} - weights
        digests = {name: sha256_file(place / name) for name in names}
    write_json(folder / FILES_NAME, given)
    named: dict[str, Any] = {name: entry for name, entry in given.items() if "/" not in name}
    if inputs.conversion is not None:
        named["conversion"] = inputs.conversion
    if inputs.transforms:
        named["transforms"] = content(inputs.transforms)
    others = {name: digest for name, digest in digests.items() if name not in weights}
    Source(
        place, sha256_json(named), dict(sorted(tensors.items())), dict(sorted(others.items()))
    ).save(folder)


STAGE = Stage("resolve", work)


def load(folder: Path, inputs: Inputs) -> Source:
    """What the stage made."""
    if inputs.transforms:
        return Source.load(folder, folder / _REWRITTEN)
    return Source.load(folder, inputs.folder if inputs.gguf is None else folder / _CONVERTED)


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}
