"""`README.md` of a published checkpoint: what it is, how good, how to load it. Torch-free.

The front matter is what the Hub reads: the model that it was made from, licence and tags. The
figures are those of `quality.json`; a folder without one gets a card without a table.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.quantization import Calibration
from bitmill.errors import BitmillError
from bitmill.formats.export_plan import ExportPlan
from bitmill.formats.format import FORMATS, Format
from bitmill.formats.headers import read_packed_headers
from bitmill.io.atomic import read_json
from bitmill.plan.config_json import CONFIG_FILE
from bitmill.reporting.charts import WIDTH_COLOURS
from bitmill.results import QUALITY_NAME, QualityReport, QualityRow, with_error

PICTURE_NAME = "bit_width_map.png"
_CELL = 8
"""Pixels of a group's side in the picture."""


@dataclass(frozen=True)
class CardFacts:
    """What the folder itself does not say.

    base_model: Hub repository that was quantized. license: its identifier on the Hub. calibration:
    what the widths and codes were chosen on. report: where the folder has none, as an export.
    """

    base_model: str | None = None
    license: str | None = None
    calibration: Calibration | None = None
    report: QualityReport | None = None


def model_card(folder: Path, repo_id: str, facts: CardFacts) -> dict[str, bytes]:
    """`README.md` and the picture that it shows, by path in the repository."""
    report = facts.report
    if (folder / QUALITY_NAME).is_file():
        report = QualityReport.load(folder / QUALITY_NAME)
    row = _own_row(report) if report else None
    files, parts = {}, [_front_matter(folder, facts, row), _opening(folder, repo_id, facts, row)]
    if report and report.rows:
        parts.append(_quality(report))
    if (folder / MAP_NAME).is_file():
        bit_widths = BitWidthMap.load(folder / MAP_NAME)
        files[PICTURE_NAME] = map_picture(bit_widths)
        parts.append(_map(bit_widths))
    parts.append(_calibration(facts.calibration, report))
    parts.append(_loading(folder, repo_id))
    return {"README.md": "\n".join(part for part in parts if part).encode()} | files


def map_picture(bit_widths: BitWidthMap) -> bytes:
    """A PNG: a row per linear, a square per group, coloured by width."""
    linears = list(bit_widths.linears.values())
    columns = max(len(widths) for widths in linears)
    palette = [(255, 255, 255)] + [
        (int(c[1:3], 16), int(c[3:5], 16), int(c[5:7], 16)) for c in WIDTH_COLOURS.values()
    ]
    places = {width: place for place, width in enumerate(WIDTH_COLOURS, 1)}
    rows = []
    for widths in linears:
        line = [places[width] for width in widths] + [0] * (columns - len(widths))
        row = bytes(place for place in line for _ in range(_CELL))
        rows += [b"\0" + row] * _CELL
    size = struct.pack(">IIBBBBB", columns * _CELL, len(linears) * _CELL, 8, 3, 0, 0, 0)
    chunks = {
        b"IHDR": size,
        b"PLTE": bytes(value for colour in palette for value in colour),
        b"IDAT": zlib.compress(b"".join(rows), 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks.items())


def _chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def _own_row(report: QualityReport) -> QualityRow | None:
    """The job's result; the source has no bits."""
    return next((row for row in report.rows if row.bits is not None), None)


def _front_matter(folder: Path, facts: CardFacts, row: QualityRow | None) -> str:
    settings = _settings(folder)
    kind = _format(folder, settings)
    tags = ["bitmill", "quantized", "mixed-precision", *_tags(kind, settings)]
    if row is not None and row.code_bits is not None and (folder / MAP_NAME).is_file():
        tags.append(f"{round(row.code_bits)}-bit")
    told: dict[str, Any] = {
        "pipeline_tag": "text-generation",
        "library_name": kind.library,
        "tags": tags,
    }
    if facts.base_model:
        told |= {"base_model": facts.base_model, "base_model_relation": "quantized"}
    if facts.license:
        told["license"] = facts.license
    lines = [f"{key}: {json.dumps(value)}" for key, value in told.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---", ""])


def _settings(folder: Path) -> dict[str, Any]:
    """Its config.json, which a folder of one GGUF file has not."""
    found: dict[str, Any] = {} if any(folder.glob("*.gguf")) else read_json(folder / CONFIG_FILE)
    return found


def _format(folder: Path, settings: dict[str, Any]) -> type[Format]:
    """That of the folder."""
    if any(folder.glob("*.gguf")):
        return FORMATS["gguf"]
    kinds = (FORMATS[name] for name in FORMATS.names())
    return next((kind for kind in kinds if kind.recognizes(settings)), Format)


def _tags(kind: type[Format], settings: dict[str, Any]) -> list[str]:
    """The format, in words of the Hub."""
    files = [] if kind is FORMATS["gguf"] else ["safetensors"]
    if kind.library != Format.library:
        return [*files, kind.library]
    method = settings.get("quantization_config", {}).get("quant_method")
    return files + ([method] if method and not kind.keeps_codes else [])


def _opening(folder: Path, repo_id: str, facts: CardFacts, row: QualityRow | None) -> str:
    source = facts.base_model and f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    what = f"{source or 'A language model'} quantized by Bitmill"
    figures = ""
    if row is not None and row.bits is not None:
        figures = f"{row.bits:.3f} bits per quantized weight, scales included"
        figures += f", {row.size:,} bytes of weights." if row.size else "."
    if (folder / MAP_NAME).is_file():
        what += ": every group of 128 input columns of every linear has a bit width of its own."
    else:
        what += " and exported for other runtimes."
        figures = figures and f"Before the export: {figures} Quality is of that checkpoint."
    return f"# {repo_id.rpartition('/')[2]}\n{what} {figures}".rstrip() + "\n"


def _quality(report: QualityReport) -> str:
    texts = list(report.rows[0].texts)
    head = ["model", "bits", "bytes"]
    head += [f"{text} {figure}" for text in texts for figure in ("perplexity", "KL")]
    lines = [head, ["---"] * len(head)]
    for row in report.rows:
        cells = [row.method, "" if row.bits is None else f"{row.bits:.3f}"]
        cells.append("" if row.size is None else f"{row.size:,}")
        for text in texts:
            found = row.texts.get(text)
            if found is None:
                cells += ["", ""]
                continue
            cells.append(with_error(found.perplexity, found.perplexity_se, ".3f"))
            cells.append(with_error(found.kl, found.kl_se, ".4f"))
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    tokens = ", ".join(f"{one.tokens:,} of {text}" for text, one in report.rows[0].texts.items())
    return (
        "## Quality\n"
        f"{table}\n\nKL is that of next-token distributions to the source's, mean nats per token; "
        f"± is one standard error over windows. Tokens: {tokens}.\n"
    )


def _map(bit_widths: BitWidthMap) -> str:
    colours = ", ".join(f"{width} bits {colour}" for width, colour in WIDTH_COLOURS.items())
    return (
        f"## Bit widths\n![Width of every group]({PICTURE_NAME})\n\nA row per linear "
        f"({len(bit_widths.linears)}), a square per group of 128 input columns: {colours}. "
        f"The widths themselves are in `{MAP_NAME}`.\n"
    )


def _calibration(used: Calibration | None, report: QualityReport | None) -> str:
    """Which text, or of a report alone, how much of it."""
    seen = max((linear.tokens or 0 for linear in report.linears), default=0) if report else 0
    if used is not None:
        text = used.text.model_dump()
        name = text.get("name") or text.get("path")
        told = f"{used.sequences} windows of {used.length} tokens of `{name}`."
    elif seen:
        told = f"{seen:,} tokens."
    else:
        return ""
    return f"## Calibration\n{told}\n"


def _loading(folder: Path, repo_id: str) -> str:
    """How each runtime that reads it does."""
    settings = _settings(folder)
    texts = [one.loading for one in _format(folder, settings).loading(settings)]
    if (folder / MAP_NAME).is_file():
        texts.append(_LLAMA_CPP_EXPORT if _gguf_holds(folder) else _PLAIN_EXPORT)
    return "\n".join(["## Loading", *texts, ""]).replace("REPO", repo_id) if texts else ""


def _gguf_holds(folder: Path) -> bool:
    """Whether a packed folder can be exported for llama.cpp."""
    try:
        stored = read_packed_headers(folder)
        return stored is not None and bool(ExportPlan.of(folder, FORMATS["gguf"](), stored))
    except BitmillError:
        return False


_LLAMA_CPP_EXPORT = """llama.cpp, after an export (others: `bitmill export --list`):
```sh
hf download REPO --local-dir packed
bitmill export packed --format gguf --out gguf
llama-cli -m gguf/model.gguf
```"""
_PLAIN_EXPORT = """What runs the source, after an export. GGUF, which llama.cpp reads, cannot hold
this checkpoint; others: `bitmill export --list`.
```sh
hf download REPO --local-dir packed
bitmill export packed --format dequantized --out plain
```"""
