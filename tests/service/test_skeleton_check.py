"""What only transformers knows of a config.json is asked before a job exists, with a deadline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import httpx2
import pytest

from bitmill.errors import ModelError
from bitmill_service.api.skeleton_check import ask_transformers
from finished import Stack
from tiny import llama_config

CONFIG: dict[str, Any] = json.loads(llama_config().to_json_string())
SECONDS = 120.0

pytestmark = pytest.mark.usefixtures("forked")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "no_such_activation"}, "no_such_activation"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"pad_token_id": 100_000}, "adding"),
        ({"rope_parameters": {"rope_type": "none_such", "rope_theta": 1e4}}, "none_such"),
        ({"num_attention_heads": 7}, "attention heads"),
    ],
    ids=str,
)
def test_what_transformers_refuses_is_refused(changes: dict[str, Any], said: str) -> None:
    for _ in range(2):  # the second answer is the kept one
        with pytest.raises(ModelError, match=said) as refused:
            ask_transformers(CONFIG | changes, SECONDS)
        assert (refused.value.code, refused.value.param) == ("bad_config", "config.json")


def test_what_it_builds_passes() -> None:
    assert ask_transformers(CONFIG, SECONDS) is None
    assert ask_transformers(CONFIG, 0.001) is None, "asked again"


def test_no_answer_in_time_is_a_note_and_not_kept() -> None:
    late = CONFIG | {"bos_token_id": 3}
    assert "no answer within" in str(ask_transformers(late, 0.001))
    assert "a moment ago" in str(ask_transformers(late, 0.001)), "it is not asked again at once"
    assert ask_transformers(late, 0) is None
    assert ask_transformers(late, SECONDS) is None
    assert ask_transformers(late, 0.001) is None


def test_it_is_asked_when_submitting_and_rehearsing(
    stack: Stack, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = stack.context.settings.model_copy(update={"skeleton_check_s": SECONDS})
    monkeypatch.setattr(stack.context, "settings", patient)
    root = stack.context.settings.model_roots["models"]
    shutil.copytree(root / "tiny", root / "odd")
    config = json.loads((root / "odd" / "config.json").read_text())
    (root / "odd" / "config.json").write_text(json.dumps(config | {"hidden_act": "odd"}))
    body = {"model": {"source": "path", "path": "models/odd"}, "budget": {"bits": 4}}
    for query in ("", "?validate_only=true"):
        answer = http.post(f"/v1/jobs{query}", json=body, timeout=SECONDS)
        assert (answer.status_code, answer.json()["code"]) == (422, "bad_config")
        assert "odd" in answer.json()["detail"]


def test_the_asking_process_loads_no_torch() -> None:
    program = (
        "import json, sys\n"
        "from bitmill_service.api.skeleton_check import ask_transformers\n"
        "assert ask_transformers(json.load(sys.stdin), 120) is None\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(CONFIG),
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
