"""What `python -m bitmill` is asked to do, one model a command. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bitmill.config.closed import Closed
from bitmill.config.device import DeviceName
from bitmill.config.quantization import Framing, QuantizationConfig


class Request(Closed):
    """What a command is asked."""

    device: DeviceName = "cpu"


class QuantizeRequest(Request):
    """A whole job on local folders; its result is the folder `out`.

    file: GGUF file in the model's folder. work: finished stages, for resuming. profiles:
    sensitivity profiles to share. stages: where equal stages of several jobs are made once.
    task_folder: harness task files of one's own.
    """

    model: Path
    file: str | None = None
    config: QuantizationConfig
    out: Path
    work: Path
    profiles: Path | None = None
    stages: Path | None = None
    task_folder: Path | None = None


class EvaluateRequest(Request):
    """A packed folder against its source: rows of a quality report.

    file: GGUF file in the source's folder. sequences: at most so many windows of `length` tokens.
    baselines: of the folder with something rounded.
    """

    folder: Path
    source: Path
    file: str | None = None
    texts: tuple[str, ...] = ("wiki_evaluation", "handbook_evaluation")
    sequences: int | None = None
    length: int = 2048
    framing: Framing = "tokenizer"
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    baselines: tuple[str, ...] = ()


class GenerateRequest(Request):
    """A prompt to continue; every piece of text is told as it comes. gguf: file of the folder."""

    folder: Path
    prompt: str
    gguf: str | None = None
    max_new_tokens: int = Field(default=64, ge=0)
    temperature: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)
    chat: bool = False


class ExportRequest(Request):
    """A packed folder in another format, at `out`; dry_run: only what would be written."""

    folder: Path
    format: str
    settings: dict[str, Any] = Field(default={})
    out: Path | None = None
    dry_run: bool = False


class BenchRequest(Request):
    """Speed and memory of a packed folder; dtype: of what is not quantized, auto: the folder's."""

    folder: Path
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    prompt_tokens: int = Field(default=512, ge=1)
    new_tokens: int = Field(default=32, ge=1)
