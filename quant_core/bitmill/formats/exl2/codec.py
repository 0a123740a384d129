"""Writing and reading exl2 folders (`formats/exl2/format.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape, code_bits
from bitmill.errors import FormatError
from bitmill.formats.codec import Supply
from bitmill.formats.exl2.format import OFF_GRID, QUANT_METHOD, Exl2, stored_name
from bitmill.formats.exl2.settings import prefix, settings_of
from bitmill.formats.export_folder import ExportFolder
from bitmill.formats.format import Contents
from bitmill.formats.one_width_codes import from_words, to_words
from bitmill.formats.writing import CONFIG_NAME, write_model
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import read_headers
from bitmill.quant.codes import group_slices
from bitmill.quant.exl2_grid import find_steps, row_scales
from bitmill.quant.rewrites import ColumnOrder
from bitmill.quant.tensors import QuantizedWeight, affine

_SCALE = 256
"""q_scale_max over m."""
VERSION = "0.3.2"
"""Of exllamav2, whose reader this was written from."""


@dataclass(frozen=True)
class Exl2Folder(ExportFolder):
    """An exl2 folder; settings: its config.json."""

    format: Exl2
    settings: dict[str, Any]

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's weight f32 [N, K]: scale * (code - 2^(b-1)), the product not rounded."""
        name = stored_name(self.settings["model_type"], shape.name)
        words, groups, steps, largest, places = (
            self.tensor(f"{name}.q_{key}")
            for key in ("weight", "groups", "scale", "scale_max", "invperm")
        )
        k = from_words(steps, 4, shape.rows).long()
        bits, starts = groups[0::2].tolist(), groups[1::2].tolist()
        parts = []
        for group, (width, start) in enumerate(zip(bits, starts, strict=True)):
            stop = starts[group + 1] if group + 1 < len(starts) else len(words)
            codes = from_words(words[start:stop].T, width, (stop - start) * 32 // width)
            scales = row_scales(largest[group].float() / _SCALE, largest.device)[k[group]]
            parts.append(scales[:, None] * (codes.float() - (1 << (width - 1))))
        return torch.cat(parts, 1)[:, places.long()]


class Exl2Codec:
    """See `formats/codec.py`."""

    def __init__(self, settings: Exl2) -> None:
        self._settings = settings

    def write(
        self,
        folder: Path,
        contents: Contents,
        supply: Supply,
        on_linear: Callable[[str], None] = lambda _: None,
    ) -> dict[str, str]:
        """Raises FormatError for a linear whose scales are not on the grid, and for a kept tensor
        beyond fp16."""
        plan = contents.plan

        def linear(name: str) -> dict[str, Tensor]:
            weight = affine({name: supply.linear(name).unpack()})[name]
            return linear_tensors(stored_name(plan.model_type, name), name, weight)

        def other(name: str) -> Tensor:
            tensor = supply.other(name.removeprefix(prefix(plan.model_type)))
            if tensor.dtype not in (torch.float32, torch.bfloat16):
                return tensor
            if not torch.isfinite(half := tensor.half()).all():
                raise FormatError(f"{name} has values beyond float16", param=name)
            return half

        names = [matrix.name for matrix in plan.linears]
        tensors = self._settings.tensors(contents)
        bits = code_bits([one.shape for one in plan.linears], contents.widths)
        own = {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "bits": round(bits, 4),
            "head_bits": 16,
        }
        settings = dict(supply.settings) | settings_of(supply.settings)
        return write_model(
            folder,
            tensors,
            names,
            linear,
            other,
            source=supply.folder,
            settings=settings | {"quantization_config": own},
            on_linear=on_linear,
        )

    def open(self, folder: Path) -> Exl2Folder:
        """See `formats/codec.py`."""
        settings = read_json(folder / CONFIG_NAME)
        return Exl2Folder(folder, read_headers(folder), self._settings, settings)

    def kept(self, weight: Tensor) -> Tensor:
        """Itself."""
        return weight


def linear_tensors(stored: str, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A linear's tensors by their names in files, its groups by falling width.

    Raises FormatError where a group's scales or zero points are not on the grid.
    """
    order = torch.arange(weight.K)
    for rewrite in weight.rewrites:
        assert isinstance(rewrite, ColumnOrder)
        order = order[rewrite.order.long()]
    slices = dict(group_slices(weight.K))
    groups = sorted(slices, key=lambda group: -weight.widths[group])
    words: list[Tensor] = []
    entries, steps, largest, start = [], [], [], 0
    for group in groups:
        width = weight.widths[group]
        found = find_steps(weight.scales[group])
        live = weight.scales[group] > 0
        if found is None or bool((weight.zeros[group][live] != 1 << (width - 1)).any()):
            raise FormatError(
                f"{name} cannot be held by format {QUANT_METHOD!r}: {OFF_GRID}",
                code="not_on_grid",
                param=name,
            )
        m, k = found
        codes = weight.codes[:, slices[group]]
        codes = torch.where(live[:, None], codes, 1 << (width - 1))
        words.append(to_words(codes, width).T)
        entries += [width, start]
        start += len(words[-1])
        steps.append(k - 1)
        largest.append(m * _SCALE)
    columns = torch.cat([order[slices[group]] for group in groups])
    return {
        f"{stored}.q_weight": torch.cat(words).contiguous(),
        f"{stored}.q_groups": torch.tensor(entries, dtype=torch.int16),
        f"{stored}.q_scale": to_words(torch.stack(steps), 4),
        f"{stored}.q_scale_max": torch.stack(largest),
        f"{stored}.q_invperm": columns.argsort().to(torch.int32),
    }
