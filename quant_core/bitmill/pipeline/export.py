"""A packed folder in another format: planned, refused or written, read back and compared.

    folder -> its plan and map -> what the format refuses, every tensor with its bytes
           -> written linear by linear -> opened again: headers, digests, weights

Nothing is written where the format has no place for something of the model. What was written is
held against what the packed folder says before it appears under its name: every tensor's header and
bytes, and of every linear the weights that the format keeps of it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bitmill.config.closed import Closed
from bitmill.config.quantization import BaseAllocation
from bitmill.errors import SpecError, VerificationError
from bitmill.formats.codec import Checkpoint, Codec, Supply, codec_of, open_checkpoint
from bitmill.formats.format import Contents, Facts, Format, check_supported
from bitmill.formats.writing import sha256_of_tensor
from bitmill.io.atomic import atomic_folder, read_json
from bitmill.io.manifest import write_manifest
from bitmill.io.safetensors import TensorInfo
from bitmill.io.targets import check_apart, check_result
from bitmill.plan.config_json import check_config, sanitize
from bitmill.plan.model_plan import Plan, build_plan


class ExportReport(Closed):
    """What is written: bytes of all files that hold tensors, and of those of the packed folder."""

    format: str
    linears: int
    tensors: int
    file_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Export:
    """A packed folder that can be written in a format; nothing is written yet."""

    folder: Path
    chosen: Format
    checkpoint: Checkpoint
    contents: Contents
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, chosen: Format) -> Export:
        """Plan it from config and headers.

        Raises `SpecError` (format_refuses) naming all that the format has no place for, and
        FormatError for a folder that is not packed.
        """
        checkpoint = open_checkpoint(folder)
        settings = sanitize(read_json(folder / "config.json"))
        settings.pop("quantization_config")
        bit_widths = checkpoint.bit_widths
        plan = plan_of(checkpoint, settings)
        contents = Contents(plan, bit_widths.linears, bit_widths.order, settings)
        if chosen.name == checkpoint.format.name:
            raise SpecError(f"{folder.name} is in format {chosen.name!r} already", param="format")
        check_supported(chosen, Facts.of(contents, settings, checkpoint.kinds, checkpoint.rewrites))
        return cls(folder, chosen, checkpoint, contents, settings)

    @cached_property
    def tensors(self) -> list[TensorInfo]:
        """Every tensor that will be written, with its bytes."""
        return self.chosen.tensors(self.contents)

    def report(self) -> ExportReport:
        """What will be written."""
        return ExportReport(
            format=self.chosen.name,
            linears=len(self.contents.plan.matrices),
            tensors=len(self.tensors),
            file_bytes=self.chosen.file_bytes(self.contents),
            packed_bytes=self.checkpoint.file_bytes,
        )

    def write(self, out: Path, on_linear: Callable[[int, int], None]) -> ExportReport:
        """Write it; `out` appears whole and verified, or not at all.

        out: replaced where it holds nothing but an earlier result. on_linear: told linears written
        and their number. Raises `InputError` for a folder that may not be replaced,
        VerificationError for the first difference, ResourceError for a full disk.
        """
        check_apart({"the packed folder": self.folder, "the output": out})
        check_result(out)
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        codec, total, done = codec_of(self.chosen), len(self.contents.plan.matrices), 0

        def count(_: str) -> None:
            nonlocal done
            done += 1
            on_linear(done, total)

        supply = Supply(
            folder=self.folder,
            settings=self.settings,
            linear=lambda name: self.checkpoint.linear(self.contents.plan.by_name[name].shape),
            other=self.checkpoint.tensor,
        )
        with atomic_folder(out, check_result) as made:
            digests = codec.write(made, self.contents, supply, count)
            self._verify(made, codec, digests)
            write_manifest(made)
        return self.report()

    def _verify(self, made: Path, codec: Codec, digests: Mapping[str, str]) -> None:
        written = codec.open(made)
        planned = {tensor.name: tensor for tensor in self.tensors}
        for name in sorted(planned.keys() ^ written.headers.keys()):
            raise _different(name, "is planned or stored, not both")
        for name, tensor in planned.items():
            found = written.headers[name]
            if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
                raise _different(name, f"is {found.dtype} of shape {found.shape}")
            if sha256_of_tensor(written.tensor(name)) != digests.get(name):
                raise _different(name, "has other bytes on disk than were written")
        for matrix in self.contents.plan.matrices:
            expected = codec.kept(self.checkpoint.weight(matrix.shape))
            if not torch.equal(written.weight(matrix.shape), expected):
                raise _different(matrix.name, "has other weights than the packed folder")
        if written.file_bytes != self.chosen.file_bytes(self.contents):
            raise VerificationError(
                f"files take {written.file_bytes} bytes, predicted were "
                f"{self.chosen.file_bytes(self.contents)}"
            )


def plan_of(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Plan:
    """The plan of the model that a packed folder was made from.

    settings: its config.json without quantization_config. Sources of linears are their names in
    transformers' module tree.
    """
    config = dict(settings)
    found = check_config(config)
    parameters = found.parameters(config).shapes
    linears = checkpoint.bit_widths.linears
    kept = checkpoint.kept
    vectors = (tensor.dtype for tensor in kept if len(tensor.shape) == 1)  # never narrowed
    dtype = next((dtype for dtype in vectors if dtype in ("BF16", "F16")), "F32")
    names = [f"{name}.weight" for name in linears]
    weights = [TensorInfo(name, dtype, parameters[name]) for name in names]
    inside = f"{found.blocks}."
    embeddings = any(not name.startswith(inside) for name in linears)
    matrices = [name.removesuffix(".weight") for name, s in parameters.items() if len(s) == 2]
    keep = tuple(name for name in matrices if name not in linears)
    allocation = BaseAllocation(
        keep=keep, embeddings="quantize" if embeddings else "keep", kept_dtype="source"
    )
    plan = build_plan(config, found, [*kept, *weights], allocation)
    return plan.model_copy(update={"format": checkpoint.format.name})


def _different(name: str, problem: str) -> VerificationError:
    return VerificationError(f"{name} of the export {problem}", param=name)
