"""A plan is kept while nothing that it depends on has changed, and no longer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bitmill.config.quantization import Budget, QuantizationConfig
from bitmill.errors import ModelError
from bitmill_service.api.plans import Plans
from tiny import tiny_llama

CONFIG = QuantizationConfig(budget=Budget(bits=3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_same_job_is_planned_once_and_another_anew(folder: Path) -> None:
    plans = Plans(settled_s=0)
    first = plans.admit(folder, CONFIG, None)
    assert plans.admit(folder, CONFIG, None) is first
    other = CONFIG.model_copy(update={"budget": Budget(bits=4)})
    assert plans.admit(folder, other, None)[0].config == other
    assert plans.admit(folder, CONFIG, None) is first


def test_changed_files_are_read_again_even_with_their_old_time_and_size(folder: Path) -> None:
    plans = Plans(settled_s=0)
    plans.admit(folder, CONFIG, None)
    config = folder / "config.json"
    before, text = config.stat(), config.read_text()
    layers = json.loads(text)["num_hidden_layers"]
    changed = text.replace(
        f'"num_hidden_layers": {layers}', f'"num_hidden_layers": {layers + 1}', 1
    )
    assert (changed != text, len(changed)) == (True, len(text))
    config.write_text(changed)
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ModelError):
        plans.admit(folder, CONFIG, None)


def test_files_that_changed_just_now_are_read_each_time(folder: Path) -> None:
    plans = Plans(settled_s=3600)
    assert plans.admit(folder, CONFIG, None) is not plans.admit(folder, CONFIG, None)
