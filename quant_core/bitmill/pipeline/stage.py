"""What a stage of a job is: typed inputs, the work that depends on nothing else, and their digest.

A stage's inputs are one frozen dataclass. All of its fields are hashed, those of nested objects
too, so a stage runs again exactly where something differs that it reads. A field that says where
something lies or how it is called, not what it is, is declared `compare=False`: it counts neither
for equality nor for the digest, and stands beside one that holds the digest of what lies there.
Only the inputs and a `Run`, which decides nothing, are handed to the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
import transformers
from pydantic import BaseModel

import bitmill
from bitmill.io.atomic import sha256_json
from bitmill.models.dtypes import compute_dtype
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.progress import StageName
from bitmill.plan.model_plan import Plan
from bitmill.runtime.ranks import Ranks
from bitmill_kernels.backend import resolve_backend

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Run:
    """Who works on a stage, where, and who watches.

    on_unit: told done, total, the unit and maybe a message; raises `Cancelled`
    where the job was asked to stop. warn: told what the user should know. seconds: wall time of the
    stages before.
    """

    device: torch.device
    group: Ranks
    on_unit: Callable[..., None]
    warn: Callable[[str], None]
    seconds: Callable[[], dict[str, float]]

    def open_model(self, folder: Path, plan: Plan) -> StreamedModel:
        """The source model on this run's device, in the precision that is computed in."""
        dtype = compute_dtype(self.device, plan)
        return StreamedModel(folder, plan, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Stage(Generic[Inputs]):
    """A folder of the workspace and how it is made.

    version: raised when the same inputs give another result. shared: all ranks do the work.
    travels: its folder is small, so that machines that share no disk send it to each other.
    """

    name: StageName
    work: Callable[[Inputs, Run, Path], None]
    version: int = 1
    shared: bool = False
    travels: bool = False

    def digest(self, inputs: Inputs) -> str:
        """Hex SHA-256 of everything that the result depends on."""
        return sha256_json(
            {
                "stage": self.name,
                "version": self.version,
                "bitmill": bitmill.__version__,
                "inputs": content(inputs),
            }
        )


@dataclass(frozen=True)
class Environment:
    """What else than data decides the bytes of sums over tokens."""

    threads: int
    device: str
    devices: int
    backend: Literal["triton", "reference"]
    torch_version: str
    transformers_version: str

    @classmethod
    def here(cls, device: torch.device, group: Ranks) -> Environment:
        """This process, with the ranks it works with."""
        triton = resolve_backend("auto", device) == "triton"
        return cls(
            threads=torch.get_num_threads(),
            device=device.type,
            devices=group.size,
            backend="triton" if triton else "reference",
            torch_version=torch.__version__,
            transformers_version=transformers.__version__,
        )


def content(value: Any) -> Any:
    """JSON that tells two values apart where they differ in anything that counts.

    Raises TypeError for what has no content of its own, a path above all: hash what lies there.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, BaseModel):
        return [type(value).__name__, hashlib.sha256(value.model_dump_json().encode()).hexdigest()]
    if is_dataclass(value):
        named = {
            one.name: content(getattr(value, one.name)) for one in fields(value) if one.compare
        }
        return [type(value).__name__, named]
    if isinstance(value, Mapping):
        return {"mapping": [[content(key), content(value[key])] for key in sorted(value)]}
    if isinstance(value, tuple | list):
        return [content(item) for item in value]
    if isinstance(value, torch.Tensor):
        return content(value.detach().cpu().contiguous().numpy())
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return [str(data.dtype), list(data.shape), hashlib.sha256(data.tobytes()).hexdigest()]
    raise TypeError(f"a {type(value).__name__} cannot be an input of a stage: {value!r}")
