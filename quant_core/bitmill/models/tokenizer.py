"""A model's tokenizer."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers

from bitmill.errors import ModelError, raise_resource_error


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder, from local files only, never with code from the folder.

    Raises `ModelError` where it cannot be loaded.
    """
    folder = Path(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise_resource_error(error)
        raise ModelError(
            f"the tokenizer of {folder.name} cannot be loaded: "
            + str(error).replace(str(folder), folder.name)[:300],
            code="bad_tokenizer",
            param="model",
        ) from error


def shared_tokenizer(folder: str | Path) -> Any:
    """The same, not to be changed: the last one is kept while the files of its folder are."""
    folder = Path(folder).absolute()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    states = ((file.name, file.stat()) for file in files)
    return _kept(folder, tuple((name, s.st_size, s.st_mtime_ns) for name, s in states))


@lru_cache(maxsize=1)
def _kept(folder: Path, _: tuple[tuple[str, int, int], ...]) -> Any:
    return load_tokenizer(folder)
