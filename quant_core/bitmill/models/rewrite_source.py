"""A source model rewritten into a folder of its own (`plan/source_model.py`), tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from bitmill.config.transforms import TransformConfig
from bitmill.formats.writing import copy_companions, write_settings, write_tensors
from bitmill.io.atomic import atomic_folder
from bitmill.models.reader import CheckpointSource
from bitmill.plan.source_model import read_source, rewritten_source
from bitmill.transforms.transform import made_of


def rewrite_source(folder: Path, target: Path, transforms: Iterable[TransformConfig]) -> None:
    """Write the model that transforms of the source make of the one in `folder`; `target` appears
    whole.

    Raises `ModelError` for a model that one of them cannot rewrite exactly.
    """
    given = folder
    for i, one in enumerate(transforms):
        made = target.with_name(f"{target.name}-{i}")
        _rewrite(folder, made, one)
        if folder != given:
            shutil.rmtree(folder)
        folder = made
    folder.replace(target)


def _rewrite(folder: Path, target: Path, transform: TransformConfig) -> None:
    before = read_source(folder)
    after = rewritten_source(before, [transform])
    with CheckpointSource(folder) as tensors, atomic_folder(target) as made:
        tensor = made_of(transform).tensors(before, tensors.read_source)
        write_tensors(made, after.stored, (), lambda _: {}, tensor)
        copy_companions(folder, made)
        write_settings(made, after.settings)
