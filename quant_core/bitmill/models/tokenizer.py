"""A model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import transformers

from bitmill.errors import ModelError, raise_resource_error
from bitmill.io.atomic import sha256_file
from bitmill.io.companions import companions


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
    """The same, not to be changed: the last one is kept for folders with the same files of it."""
    folder = Path(folder).absolute()
    files = [*companions(folder), "config.json"] if folder.is_dir() else []
    there = [name for name in files if (folder / name).is_file()]
    key = tuple((name, sha256_file(folder / name)) for name in there)
    with _LOADING:
        if key not in _kept:
            tokenizer = load_tokenizer(folder)
            _kept.clear()
            _kept[key] = tokenizer
        return _kept[key]


_LOADING = Lock()
_kept: dict[tuple[tuple[str, str], ...], Any] = {}
