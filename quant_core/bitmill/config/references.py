"""Texts and maps as users name them in a word: on the command line and in the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.slim_llm import read_slim_map
from bitmill.errors import FormatError


def text_reference(text: str) -> dict[str, Any]:
    """A calibration text: `bundled:NAME`, `dataset:NAME`, or a file."""
    source, found, name = text.partition(":")
    if found and source in ("bundled", "dataset"):
        return {"source": source, "name": name}
    return {"source": "file", "path": text}


def read_map(path: Path) -> BitWidthMap:
    """A map from a JSON file, a packed folder, or a published SliM-LLM file (.pt)."""
    if path.is_dir():
        if not (path / MAP_NAME).is_file():
            raise FormatError(f"{path} holds no {MAP_NAME}: give a packed folder, or a map's file")
        return BitWidthMap.load(path / MAP_NAME)
    return read_slim_map(path) if path.suffix == ".pt" else BitWidthMap.load(path)
