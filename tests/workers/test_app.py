"""The Celery app and its dispatcher."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from bitmill_workers.messaging.app import Dispatcher, create_celery
from bitmill_workers.settings import TIERS, Settings
from stores import wait_for


def test_no_celery_process_imports_torch() -> None:
    code = (
        "import sys, bitmill_workers.messaging.app, bitmill_workers.store.jobs, "
        "bitmill_workers.messaging.tasks, bitmill_workers.worker, "
        "bitmill_workers.messaging.reconcile, bitmill_workers.execution.fetch, "
        "bitmill_workers.execution.supervisor, huggingface_hub; "
        "huggingface_hub.HfApi, huggingface_hub.snapshot_download; "
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


def test_messages_hold_a_job_id_and_nothing_else(settings: Settings) -> None:
    sent: list[str] = []
    dispatcher = Dispatcher(settings, sent.extend)
    dispatcher.notify("job-1", "gpu-48")
    wait_for(lambda: sent == ["job-1"], "the message")
    assert (dispatcher.depth("gpu-48"), dispatcher.depth("cpu")) == (1, 0)
    (file,) = (settings.data / "broker" / "queue").glob("*.gpu-48.msg")
    message = json.loads(file.read_text())
    assert message["headers"]["argsrepr"] == "['job-1']"
    dispatcher.close()


def test_a_broker_that_is_away_delays_nobody(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, broker_url="redis://127.0.0.1:1/0")
    sent: list[str] = []
    dispatcher = Dispatcher(settings, sent.extend)
    began = time.monotonic()
    for number in range(2000):
        dispatcher.notify(f"job-{number}", "cpu")
    assert time.monotonic() - began < 60
    assert not dispatcher.send("job", "cpu")
    assert dispatcher.depth("cpu") is None
    assert sent == []


def test_delivery_settings_are_the_measured_ones(settings: Settings) -> None:
    conf = create_celery(settings).conf
    assert not conf.task_acks_late
    assert conf.result_backend is None
    assert conf.accept_content == ["json"]
    assert not conf.worker_cancel_long_running_tasks_on_connection_loss
    assert {q.name: q.routing_key for q in conf.task_queues} == {t: t for t in TIERS}
