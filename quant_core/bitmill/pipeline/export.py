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
from pathlib import Path

import torch

from bitmill.errors import VerificationError
from bitmill.formats.codec import Checkpoint, Codec, Supply, codec_of, open_checkpoint
from bitmill.formats.export_plan import ExportPlan, ExportReport
from bitmill.formats.format import Format
from bitmill.formats.writing import sha256_of_tensor
from bitmill.io.atomic import atomic_folder
from bitmill.io.manifest import write_manifest
from bitmill.io.targets import check_apart, check_result


@dataclass(frozen=True)
class Export:
    """A packed folder that can be written in a format; nothing is written yet."""

    plan: ExportPlan
    checkpoint: Checkpoint

    @classmethod
    def of(cls, folder: Path, chosen: Format) -> Export:
        """Plan it from config and headers; raises as `ExportPlan.of` does."""
        checkpoint = open_checkpoint(folder)
        return cls(ExportPlan.of(folder, chosen, checkpoint), checkpoint)

    def report(self) -> ExportReport:
        """What will be written."""
        return self.plan.report()

    def write(self, out: Path, on_linear: Callable[[int, int], None]) -> ExportReport:
        """Write it; `out` appears whole and verified, or not at all.

        out: replaced where it holds nothing but an earlier result. on_linear: told linears written
        and their number. Raises `InputError` for a folder that may not be replaced,
        VerificationError for the first difference, ResourceError for a full disk.
        """
        check_apart({"the packed folder": self.plan.folder, "the output": out})
        check_result(out)
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        codec, total, done = codec_of(self.plan.chosen), len(self.plan.contents.plan.matrices), 0

        def count(_: str) -> None:
            nonlocal done
            done += 1
            on_linear(done, total)

        supply = Supply(
            folder=self.plan.folder,
            settings=self.plan.settings,
            linear=lambda name: self.checkpoint.linear(self.plan.contents.plan.by_name[name].shape),
            other=self.checkpoint.tensor,
        )
        with atomic_folder(out, check_result) as made:
            digests = codec.write(made, self.plan.contents, supply, count)
            self._verify(made, codec, digests)
            write_manifest(made)
        return self.report()

    def _verify(self, made: Path, codec: Codec, digests: Mapping[str, str]) -> None:
        written = codec.open(made)
        planned = {tensor.name: tensor for tensor in self.plan.tensors}
        for name in sorted(planned.keys() ^ written.headers.keys()):
            raise _different(name, "is planned or stored, not both")
        for name, tensor in planned.items():
            found = written.headers[name]
            if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
                raise _different(name, f"is {found.dtype} of shape {found.shape}")
            if sha256_of_tensor(written.tensor(name)) != digests.get(name):
                raise _different(name, "has other bytes on disk than were written")
        for matrix in self.plan.contents.plan.matrices:
            expected = codec.kept(self.checkpoint.weight(matrix.shape))
            if not torch.equal(written.weight(matrix.shape), expected):
                raise _different(matrix.name, "has other weights than the packed folder")
        if written.file_bytes != self.plan.chosen.file_bytes(self.plan.contents):
            raise VerificationError(
                f"files take {written.file_bytes} bytes, predicted were "
                f"{self.plan.chosen.file_bytes(self.plan.contents)}"
            )


def _different(name: str, problem: str) -> VerificationError:
    return VerificationError(f"{name} of the export {problem}", param=name)
