"""Writing and reading MLX checkpoints (`formats/mlx/format.py`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape
from bitmill.formats.format import Contents
from bitmill.formats.mlx.format import Mlx
from bitmill.formats.older_settings import older_names
from bitmill.formats.one_width import group_size, stored_as
from bitmill.formats.one_width_codes import (
    OneWidth,
    OneWidthCodec,
    OneWidthFolder,
    from_words,
    to_words,
)


@dataclass(frozen=True)
class MlxFolder(OneWidthFolder):
    """An MLX checkpoint."""

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's weight f32 [N, K]: scale * code + bias, in fp32."""
        name = stored_as(self.settings["model_type"], shape.name)
        own = self.settings["quantization"][name]
        words, scales, biases = (
            self.tensor(f"{name}.{key}") for key in ("weight", "scales", "biases")
        )
        codes = from_words(words.view(torch.int32), own["bits"], shape.columns).float()
        scale, bias = (
            grid.float().repeat_interleave(own["group_size"], 1) for grid in (scales, biases)
        )
        return scale * codes + bias


class MlxCodec(OneWidthCodec):
    """See `formats/codec.py`."""

    folder: ClassVar[type[OneWidthFolder]] = MlxFolder

    def __init__(self, settings: Mlx) -> None:
        super().__init__(settings)
        self._dtype: torch.dtype = getattr(torch, settings.dtype)

    def tensors(self, name: str, linear: OneWidth, bits: int) -> dict[str, Tensor]:
        """Codes in words, and the two numbers of each group."""
        codes, zeros = linear.codes, linear.zeros
        if self._settings.symmetric:
            codes, zeros = linear.signed(bits), torch.full_like(zeros, 1 << (bits - 1))
        scales = linear.scales.T.float()
        return {
            f"{name}.weight": to_words(codes, bits).view(torch.uint32),
            f"{name}.scales": scales.to(self._dtype).contiguous(),
            f"{name}.biases": (-scales * zeros.T.float()).to(self._dtype).contiguous(),
        }

    def config(self, contents: Contents, bits: dict[str, int]) -> dict[str, Any]:
        """The commonest scheme, and that of every linear by its name."""
        kind = contents.plan.model_type
        schemes = {
            stored_as(kind, one.name): (bits[one.name], group_size(one.columns))
            for one in contents.plan.linears
        }
        width, size = Counter(schemes.values()).most_common(1)[0][0]
        each = {name: {"group_size": s, "bits": b} for name, (b, s) in schemes.items()}
        return {"group_size": size, "bits": width, "mode": "affine", **each}

    def settings(self, contents: Contents) -> dict[str, Any]:
        """Besides, what mlx-lm reads by an older name alone."""
        return super().settings(contents) | older_names(contents.config)
