"""`evaluate`: a packed folder against its source, as a job measures its own."""

from __future__ import annotations

import os
from pathlib import Path

from bitmill.evaluation.compare import evaluate_folder
from bitmill.library.progress import Watcher, watching
from bitmill.library.settings import model_files
from bitmill.pipeline.progress import Progress
from bitmill.results import QualityRow

PathLike = str | os.PathLike[str]


def evaluate(
    packed: PathLike,
    source: PathLike,
    *,
    texts: tuple[str, ...] = ("wiki_evaluation", "handbook_evaluation"),
    sequences: int | None = None,
    length: int = 2048,
    tasks: tuple[str, ...] = (),
    task_folder: PathLike | None = None,
    baselines: tuple[str, ...] = (),
    device: str = "cpu",
    progress: Watcher | bool | None = None,
) -> list[QualityRow]:
    """Measure a packed folder: the rows "source" and "packed" of a quality report.

    source: folder or GGUF file that it was made from. sequences: at most so many windows of
    `length` tokens of each text. tasks: of lm-evaluation-harness, by name; task_folder: files of
    one's own for them. baselines: rows of the folder with activations or cache rounded too, such as
    "activations-8" (`bitmill/config/rounded.py`).

    Raises `InputError` where the folder was made from another model.
    """
    folder, gguf = model_files(source)

    def on_unit(done: int, total: int, unit: str, message: str) -> None:
        watch(
            Progress(
                kind="progress",
                stage="evaluate",
                done=done,
                total=total,
                unit=unit,
                message=message,
            )
        )

    with watching(progress) as watch:
        return evaluate_folder(
            Path(packed),
            folder,
            gguf=gguf,
            texts=tuple(texts),
            sequences=sequences,
            length=length,
            tasks=tuple(tasks),
            task_folder=None if task_folder is None else Path(task_folder),
            baselines=tuple(baselines),
            device=device,
            on_unit=on_unit,
        )
