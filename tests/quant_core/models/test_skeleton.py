"""Configurations held against what transformers builds, in this process and in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitmill.errors import ModelError
from bitmill.models.skeleton import check_generation, check_skeleton
from tiny import llama_config
from warm_python import FORKED

CONFIG: dict[str, Any] = llama_config().to_dict()


def test_what_transformers_builds_as_planned_passes() -> None:
    check_skeleton(CONFIG)
    check_skeleton(CONFIG | {"attention_bias": True, "tie_word_embeddings": False})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 7},
        {"hidden_act": "no_such_activation"},
        {"rope_parameters": {"rope_type": "no_such_type", "rope_theta": 10000.0}},
        {"rms_norm_eps": "small"},
        {"pad_token_id": 100_000},
    ],
    ids=str,
)
def test_what_transformers_cannot_build_is_refused_with_its_reason(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(ModelError, match="cannot build a llama model") as caught:
        check_skeleton(CONFIG | changes)
    assert caught.value.code == "bad_config"
    assert "\n" not in caught.value.message


def test_another_model_than_planned_is_refused() -> None:
    """Cross attention is a setting that the tables do not know."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 258, "n_embd": 64, "n_layer": 1, "n_head": 4}
    check_skeleton(gpt2)
    with pytest.raises(ModelError, match=r"builds transformer\.h\.0\.crossattention\.\S+ with"):
        check_skeleton(gpt2 | {"add_cross_attention": True})


@pytest.mark.parametrize(
    ("settings", "accepted"),
    [
        ({"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True}, True),
        ({"temperature": 0.6, "do_sample": False}, True),
        ({}, True),
        ({"cache_implementation": "no_such_cache"}, False),
        ({"early_stopping": "perhaps"}, False),
        ({"max_new_tokens": -1}, False),
    ],
    ids=str,
)
def test_generation_settings_that_do_not_load_are_refused(
    settings: dict[str, Any], accepted: bool, tmp_path: Path
) -> None:
    check_generation(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    if accepted:
        check_generation(tmp_path)
        return
    with pytest.raises(ModelError, match=r"refuses generation_config\.json") as refused:
        check_generation(tmp_path)
    assert refused.value.param == "generation_config.json"


def test_generation_settings_that_are_no_json_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ')
    check_generation(tmp_path)


def test_another_process_answers_in_json() -> None:
    def run(config: dict[str, Any]) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "bitmill.models.skeleton"],
            input=json.dumps(config),
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | FORKED,
        )
        return done.returncode, done.stdout

    assert run(CONFIG) == (0, "")
    code, said = run(CONFIG | {"num_attention_heads": 7})
    assert (code, json.loads(said)["code"]) == (2, "bad_config")
