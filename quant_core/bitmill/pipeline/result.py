"""What a finished job made: a published folder, and what is to be known of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.io.manifest import Manifest, read_manifest
from bitmill.reporting.html import write_report
from bitmill.results import QUALITY_NAME, QualityReport, QualityRow, with_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, repr=False)
class Result:
    """A packed folder; takes the place of its path wherever one is asked for.

    profile_id: of the sensitivity profile, None where none was needed or is known.
    """

    folder: Path
    map: BitWidthMap
    manifest: Manifest
    quality: QualityReport
    profile_id: str | None = None

    @classmethod
    def read(cls, place: str | os.PathLike[str], profile_id: str | None = None) -> Result:
        """What lies in a published folder; raises `FormatError` for any other."""
        folder = Path(place)
        return cls(
            folder,
            BitWidthMap.load(folder / MAP_NAME),
            read_manifest(folder),
            QualityReport.load(folder / QUALITY_NAME),
            profile_id,
        )

    @property
    def row(self) -> QualityRow:
        """What was measured of the folder itself; `quality.rows` has the source and baselines."""
        return self.quality.rows[1]

    @property
    def bits(self) -> float | None:
        """Bits of a quantized weight, with scales, zero points and orders."""
        return self.row.bits

    @property
    def code_bits(self) -> float | None:
        """Mean bits of the codes alone."""
        return self.row.code_bits

    @property
    def size(self) -> int | None:
        """Bytes of all safetensors files."""
        return self.row.size

    @property
    def predicted_loss(self) -> float | None:
        """Increase of the loss that the profile predicted, nats per token; None without one."""
        return self.quality.predicted_loss

    def load(self, **options: Any) -> PreTrainedModel:
        """The model, see `bitmill.load`."""
        from bitmill.inference.load import load

        return load(self.folder, **options)

    def write_report(self, file: str | os.PathLike[str]) -> None:
        """Write the report as one self-contained HTML page."""
        write_report(self.folder, Path(file))

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        lines = [f"Result {self.folder}: {len(self.map.linears)} linears"]
        if self.size is not None:
            lines[0] += f", {self.bits:.4f} bits ({self.code_bits:.4f} code bits), "
            lines[0] += f"{self.size:,} bytes"
        if self.predicted_loss is not None:
            lines.append(f"  predicted loss {self.predicted_loss:+.4f} nats per token")
        for name, text in self.row.texts.items():
            source = self.quality.rows[0].texts[name]
            increase = with_error(text.loss_increase, text.loss_increase_se, "+.4f")
            lines.append(
                f"  {name}: perplexity {text.perplexity:.2f} (source {source.perplexity:.2f}), "
                f"loss {increase}, KL {text.kl:.4f}"
            )
        lines += [f"  warning: {warning}" for warning in self.quality.warnings]
        return "\n".join(lines)
