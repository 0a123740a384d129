"""lm-evaluation-harness tasks on a loaded model, through the library itself (extra `eval`).

    pip install "bitmill[eval]"

A task's data set comes from the Hub, or from its cache where there is no network; a folder of task
files (YAML, data on disk) adds tasks of one's own. Such a file may name Python code to run, so a
folder is only ever given by the person at the command line, never by a job's specification.

Scores are the harness's own: `acc` is the share of samples whose likeliest answer is right,
`acc_norm` the same with log-likelihoods divided by the answers' lengths in characters.

Log-likelihoods are formed and added in float32, whatever dtype the logits have. By default the
harness does both in the logits' dtype: in bfloat16 an answer of -33 nats is known to a quarter of
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitmill.errors import InputError
from bitmill.results import TaskMetric, TaskQuality

BATCH = 8
"""Requests that run through the model at once."""


def check_harness(names: Sequence[str]) -> None:
    """Raise `InputError` where there are tasks and no harness."""
    if names and find_spec("lm_eval") is None:
        raise InputError(
            f"tasks {', '.join(names)} need the package lm-eval, which is not installed: run "
            'pip install "bitmill[eval]", or leave the tasks out',
            code="missing_extra",
            param="evaluation.tasks",
        )


class TaskSuite:
    """Tasks by name, with their data sets at hand.

    folder: adds the task files below it. Raises `InputError` where the harness is not installed, a
    name is unknown or the data of a task cannot be had.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        check_harness(names)
        if folder is not None and not folder.is_dir():
            raise InputError(f"there is no folder of tasks {folder}", param="--task-folder")
        self.names = tuple(dict.fromkeys(names))
        self._manager = _manager(self.names, folder)
        for name in self.names:
            self._check(name)

    def _check(self, name: str) -> None:
        """Load a task once, which fetches its data or finds it in the cache."""
        if name not in self._manager.all_tasks:
            raise InputError(
                f"the harness has no task {name!r} (it has {len(self._manager.all_tasks)}, among "
                "them piqa, arc_easy, boolq); add files of your own with --task-folder",
                code="unknown_task",
                param="evaluation.tasks",
            )
        try:
            self._manager.load([name])
        except OSError as error:
            raise InputError(
                f"the data set of task {name!r} cannot be had: {error}; fetch it once on a machine "
                "with network access and give its cache by HF_HOME, or use a local task file",
                code="missing_data_set",
                param="evaluation.tasks",
            ) from error

    def measure(
        self,
        model: Any,
        tokenizer: Any,
        *,
        on_task: Callable[[str], None],
        seed: int = 0,
        chat: bool = False,
    ) -> dict[str, TaskQuality]:
        """Scores of a transformers causal language model, on the device it lies on.

        A name that stands for several tasks gives one entry for each. on_task: told each name when
        it is finished. chat: questions are put into the tokenizer's chat
        template.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        runner = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=BATCH, softmax_dtype="float32"
        )
        found: dict[str, TaskQuality] = {}
        for name in self.names:
            scored = simple_evaluate(
                model=runner,
                tasks=[name],
                task_manager=self._manager,
                log_samples=False,
                apply_chat_template=chat,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            found |= {
                task: _quality(scored, task, samples["effective"])
                for task, samples in scored["n-samples"].items()
            }
            on_task(name)
        return found


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's index of tasks; its own thousands are read only where a name needs them."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    own = TaskManager(include_path=str(folder), include_defaults=False)
    return own if set(names) <= set(own.all_tasks) else TaskManager(include_path=str(folder))


def _quality(scored: Mapping[str, Any], task: str, samples: int) -> TaskQuality:
    """One task of the harness's result, whose keys are "metric,filter"; filter "none" is dropped.

    A standard error that the harness does not give is the text "N/A".
    """
    results = scored["results"][task]
    metrics = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        metrics[metric if kind == "none" else key] = TaskMetric(
            value=float(value), se=float(error) if isinstance(error, int | float) else None
        )
    return TaskQuality(samples=samples, version=str(scored["versions"][task]), metrics=metrics)
