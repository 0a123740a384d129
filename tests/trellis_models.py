"""Small models in trellis codes, packed by whole jobs."""

from __future__ import annotations

from pathlib import Path

from bitmill.config.quantization import parse_config
from bitmill.pipeline.job import run_job


def pack_trellis(source: Path, folder: Path) -> Path:
    """A small model in codes of mixed widths and column orders."""
    text = {"source": "file", "path": str(Path(__file__).parent / "quant_core" / "calibration.txt")}
    asked = parse_config(
        {
            "code": "trellis",
            "budget": {"bits": 3.3},
            "allocation": {"order": "activation"},
            "calibration": {"text": text, "sequences": 4, "length": 64, "held_out": 2},
            "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": 64},
            "threads": 1,
        }
    )
    run_job(asked, source, folder.with_name("work"), folder)
    return folder
