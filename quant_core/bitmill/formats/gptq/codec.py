"""Writing and reading GPTQ checkpoints (`formats/gptq/format.py`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape
from bitmill.formats.codec import Supply
from bitmill.formats.export_folder import ExportFolder
from bitmill.formats.format import Contents
from bitmill.formats.gptq.format import QUANT_METHOD, GPTQCheckpoint
from bitmill.formats.one_width import group_size, stored_as
from bitmill.formats.one_width_codes import OneWidth, from_words, to_words
from bitmill.formats.writing import copy_companions, write_settings, write_tensors
from bitmill.io.atomic import disk_errors, read_json
from bitmill.io.safetensors import read_headers

VERSIONS = {1: "gptq", 2: "gptq_v2"}


class GPTQCodec:
    """See `formats/codec.py`."""

    def __init__(self, settings: GPTQCheckpoint) -> None:
        self._settings = settings

    def write(
        self,
        folder: Path,
        contents: Contents,
        supply: Supply,
        on_linear: Callable[[str], None] = lambda _: None,
    ) -> dict[str, str]:
        """See `formats/codec.py`."""
        bits = self._settings.bits(contents)

        def linear(name: str) -> dict[str, Tensor]:
            columns, b = contents.plan.by_name[name].columns, bits[name]
            size = group_size(columns)
            found = OneWidth.of(name, supply.linear(name), size)
            codes, zeros = found.codes, found.zeros
            if self._settings.symmetric:
                codes, zeros = found.signed(b), torch.full_like(zeros, 1 << (b - 1))
            if self._settings.version == 1:
                zeros = zeros - 1
            name = stored_as(contents.plan.model_type, name)
            return {
                f"{name}.qweight": to_words(codes, b).T.contiguous(),
                f"{name}.qzeros": to_words(zeros, b),
                f"{name}.scales": found.scales,
                f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // size,
            }

        tensors = self._settings.tensors(contents)
        digests = write_tensors(folder, tensors, bits, linear, supply.other, on_linear=on_linear)
        with disk_errors(folder):
            copy_companions(supply.folder, folder)
        own = {"quantization_config": self._config(contents, bits)}
        write_settings(folder, dict(supply.settings) | own)
        return digests

    def open(self, folder: Path) -> GPTQFolder:
        """See `formats/codec.py`."""
        settings = read_json(folder / "config.json")
        return GPTQFolder(folder, read_headers(folder), self._settings, settings)

    def kept(self, weight: Tensor) -> Tensor:
        """Itself."""
        return weight

    def _config(self, contents: Contents, bits: dict[str, int]) -> dict[str, Any]:
        plan = contents.plan
        inside = f"{plan.block_prefix}."
        schemes = {one.name: (bits[one.name], group_size(one.columns)) for one in plan.linears}
        common, size = Counter(schemes.values()).most_common(1)[0][0]
        dynamic: dict[str, dict[str, int]] = {}
        for tensor in plan.tensors:
            name = tensor.name.removesuffix(".weight")
            if len(tensor.shape) == 2 and name != tensor.name and name.startswith(inside):
                dynamic[f"-:{_exactly(name)}"] = {}
        for linear in plan.linears:
            own = schemes[linear.name]
            if own != (common, size):
                rule = f"+:{_exactly(stored_as(plan.model_type, linear.name))}"
                dynamic[rule] = {"bits": own[0], "group_size": own[1]}
        version = VERSIONS[self._settings.version]
        return {
            "quant_method": QUANT_METHOD,
            "bits": common,
            "group_size": size,
            "desc_act": False,
            "sym": self._settings.symmetric,
            "lm_head": False,
            "checkpoint_format": version,
            "format": version,
            "dynamic": dynamic,
        }


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


@dataclass(frozen=True)
class GPTQFolder(ExportFolder):
    """A GPTQ checkpoint; settings: its config.json."""

    format: GPTQCheckpoint
    settings: dict[str, Any]

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's weight f32 [N, K]: scale * (code - zero)."""
        config = self.settings["quantization_config"]
        name = stored_as(self.settings["model_type"], shape.name)
        own = config | config["dynamic"].get(f"+:{_exactly(name)}", {})
        bits = own["bits"]
        qweight, qzeros, scales = (
            self.tensor(f"{name}.{key}") for key in ("qweight", "qzeros", "scales")
        )
        codes = from_words(qweight.T, bits, shape.columns)
        zeros = from_words(qzeros, bits, shape.rows)
        if config["checkpoint_format"] == VERSIONS[1]:
            zeros = zeros + 1
        return OneWidth(codes, scales, zeros, own["group_size"]).dequantize()
