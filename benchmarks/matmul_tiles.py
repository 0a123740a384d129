"""Launch shapes of recorded sweeps, put into `tiles.json`.

    python benchmarks/matmul_tiles.py RECORD.json ...

A record of `matmul.py --sweep` or `matmul_triton.py` has, under "settings", a list for each kernel,
whose entries are those of `tiles.json`. Each replaces the entry of its case; one whose shape is
null takes it out, so that the rule holds again. Later records win. What no kernel can take is
refused, and the file stays as it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitmill_kernels.matmul.tiles import STORED, TABLE_VERSION, read_table

KERNELS = ("decode_cuda", "decode_triton", "dequantize_triton")
CASE = ("gpu", "N", "K", "widths", "tokens")

Settings = Mapping[str, list[dict[str, Any]]]
"""Entries by kernel."""


def merge(settings: Settings, file: Path = STORED) -> None:
    """Replace the entries of these cases in a table. Raises ValueError for what cannot be."""
    unknown = set(settings) - set(KERNELS)
    if unknown:
        raise ValueError(f"settings are of {sorted(unknown)}: the kernels are {KERNELS}")
    stored = json.loads(file.read_text())
    for kernel, entries in settings.items():
        by_case = {case_of(entry): entry for entry in (*stored[kernel], *entries)}
        kept = [entry for entry in by_case.values() if entry["shape"] is not None]
        stored[kernel] = sorted(kept, key=case_of)
    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder) / file.name
        tried.write_text(text(stored))
        read_table(tried)
    file.write_text(text(stored))


def case_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(name, 0) for name in CASE)


def text(table: dict[str, Any]) -> str:
    """JSON, an entry a line."""
    parts = [f' "schema_version": {TABLE_VERSION}']
    for kernel in KERNELS:
        entries = ",".join(f"\n  {json.dumps(entry)}" for entry in table[kernel])
        parts.append(f' "{kernel}": [{entries}\n ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path)
    for record in parser.parse_args().records:
        settings = json.loads(record.read_text())["settings"]
        merge(settings)
        print(record, {kernel: len(entries) for kernel, entries in settings.items()})


if __name__ == "__main__":
    main()
