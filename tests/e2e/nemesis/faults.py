"""Faults that are injected while jobs run. Each is a function of (stack, dice) and undoes itself.

Names follow the fault matrix in docs/reliability.md. A fault that finds nothing to hit (no runner
is alive at that moment, say) reports so and is drawn again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

import httpx2
from stack import EmbeddedStack, ProductionStack, Stack, children, request, runners, spec_json

Fault = Callable[[Stack, random.Random], bool]


def _signal(pids: list[int], number: int, dice: random.Random) -> bool:
    if not pids:
        return False
    with suppress(ProcessLookupError):
        os.kill(dice.choice(pids), number)
    return True


def kill_worker(stack: Stack, dice: random.Random) -> bool:
    """F1: SIGKILL a worker's main process."""
    return _signal(stack.worker_pids(), signal.SIGKILL, dice)


def kill_pool(stack: Stack, dice: random.Random) -> bool:
    """F1: SIGKILL the process that supervises a job."""
    pool = [child for pid in stack.worker_pids() for child in children(pid)]
    return _signal(pool, signal.SIGKILL, dice)


def kill_runner(stack: Stack, dice: random.Random) -> bool:
    """F1: SIGKILL one process of a runner's group."""
    return _signal(runners(stack), signal.SIGKILL, dice)


def kill_tree(stack: Stack, dice: random.Random) -> bool:
    """F1: SIGKILL a worker, its pool process and its runner at once."""
    workers = stack.worker_pids()
    if not workers:
        return False
    tree = [dice.choice(workers)]
    for pid in tree:
        tree.extend(children(pid))
    for pid in tree:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


def freeze_worker(stack: Stack, dice: random.Random) -> bool:
    """F2: SIGSTOP a worker and its pool process for longer than the lease, then SIGCONT."""
    workers = stack.worker_pids()
    if not workers:
        return False
    worker = dice.choice(workers)
    tree = [*children(worker), worker]
    for number, pause in ((signal.SIGSTOP, stack.settings.lease_s + 3), (signal.SIGCONT, 0.0)):
        for pid in tree:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(pause)
    return True


def stop_worker(stack: Stack, dice: random.Random) -> bool:
    """F3: SIGTERM a worker in the middle of a job."""
    return _signal(stack.worker_pids(), signal.SIGTERM, dice)


def kill_api(stack: Stack, dice: random.Random) -> bool:
    """F13: SIGKILL an API process."""
    return _signal(stack.api_pids(), signal.SIGKILL, dice)


def cancel_storm(stack: Stack, dice: random.Random) -> bool:
    """F16: cancel random jobs twice, whatever state they are in."""
    with suppress(httpx2.HTTPError):
        found = request(stack, "GET", "/v1/jobs?state=running").json()["jobs"]
        for job in found[: dice.randint(1, 2)]:
            for _ in range(2):
                request(stack, "POST", f"/v1/jobs/{job['id']}/cancel")
        return bool(found)
    return False


def poison_job(stack: Stack, dice: random.Random) -> bool:
    """F17: jobs whose runner crashes, fills the disk, hangs, or leaves no output."""
    acts = ["do=segfault", "do=memory", "do=fill", "half=1", "do=refuse", "do=raise"]
    return _submit(stack, f"steps=2 {dice.choice(acts)}")


def killing_job(stack: Stack, dice: random.Random) -> bool:
    """F18: a job whose runner kills the process that supervises it."""
    return _submit(stack, f"steps={dice.randint(2, 4)} do=kill-worker")


def _submit(stack: Stack, label: str) -> bool:
    with suppress(httpx2.HTTPError):
        return request(stack, "POST", "/v1/jobs", json=spec_json(label)).status_code == 202
    return False


def repeat_messages(stack: Stack, dice: random.Random) -> bool:
    """F8: announce every job again, in any order, and jobs that do not exist."""
    from bitmill_workers.messaging.app import Dispatcher

    with suppress(httpx2.HTTPError):
        ids = [j["id"] for j in request(stack, "GET", "/v1/jobs?limit=100").json()["jobs"]]
        dice.shuffle(ids)
        sender = Dispatcher(stack.settings, lambda _: None)
        for job_id in [*ids, "no-such-job"]:
            sender.send(job_id, "cpu")
        sender.close()
        return True
    return False


def _production(stack: Stack) -> ProductionStack:
    assert isinstance(stack, ProductionStack)
    return stack


def kill_redis(stack: Stack, dice: random.Random) -> bool:
    """F4: SIGKILL Redis and start it again; without AOF its messages are gone."""
    redis = _production(stack).redis
    redis.kill()
    redis.aof = dice.random() < 0.5
    time.sleep(dice.uniform(0.5, 4))
    redis.start()
    return True


def flush_redis(stack: Stack, _: random.Random) -> bool:
    """F4: delete everything in Redis, the queues' bindings included."""
    _production(stack).redis.command("FLUSHALL")
    return True


def submit_without_redis(stack: Stack, dice: random.Random) -> bool:
    """F5: submit while Redis is down."""
    redis = _production(stack).redis
    redis.kill()
    done = _submit(stack, "steps=2")
    time.sleep(dice.uniform(1, 3))
    redis.start()
    return done


def full_redis(stack: Stack, dice: random.Random) -> bool:
    """F6: Redis refuses writes for a while."""
    redis = _production(stack).redis
    redis.command("CONFIG", "SET", "maxmemory", "1")
    _submit(stack, "steps=2")
    time.sleep(dice.uniform(1, 3))
    redis.command("CONFIG", "SET", "maxmemory", "0")
    return True


def freeze_redis_link(stack: Stack, dice: random.Random) -> bool:
    """F7: connections to Redis are half open for a while."""
    proxy = _production(stack).redis_proxy
    proxy.freeze()
    time.sleep(dice.uniform(2, 8))
    proxy.thaw()
    return True


def freeze_database_link(stack: Stack, dice: random.Random) -> bool:
    """F7: connections to PostgreSQL are half open, sometimes for longer than the lease."""
    proxy = _production(stack).postgres_proxy
    proxy.freeze()
    time.sleep(dice.uniform(2, stack.settings.lease_s + 4))
    proxy.thaw()
    return True


def garbage_messages(stack: Stack, dice: random.Random) -> bool:
    """F8: messages that are no messages, and of tasks that do not exist."""
    redis = _production(stack).redis
    for _ in range(10):
        junk = dice.choice(["", "{", '{"body": 1}', "\\x00" * 50, '{"body":"e30=","headers":{}}'])
        redis.command("LPUSH", "bitmill:cpu", junk)
    return True


def restart_postgres(stack: Stack, dice: random.Random) -> bool:
    """F9: PostgreSQL ends as in a crash and starts again."""
    postgres = _production(stack).postgres
    postgres.stop()
    time.sleep(dice.uniform(0, 3))
    postgres.start()
    return True


def cut_database(stack: Stack, _: random.Random) -> bool:
    """F9: every database session is terminated."""
    _production(stack).postgres.cut_connections()
    return True


def garbage_files(stack: Stack, dice: random.Random) -> bool:
    """F8, embedded: broken and empty message files."""
    queue = stack.settings.data / "broker" / "queue"
    for number in range(3):
        junk = dice.choice([b"", b"{", b'{"body": 1, "properties": {}}'])
        (queue / f"{number}_junk.cpu.msg").write_bytes(junk)
    return True


def second_service(stack: Stack, _: random.Random) -> bool:
    """F19: another service on the same data folder must refuse to start."""
    assert isinstance(stack, EmbeddedStack)
    rival = stack.launch()
    try:
        refused = rival.wait(30) != 0
    except subprocess.TimeoutExpired:
        refused = False
    if not refused and stack.api_pids():
        rival.kill()
        raise AssertionError("a second service started on the same data folder")
    return True


COMMON: tuple[Fault, ...] = (
    kill_worker,
    kill_pool,
    kill_runner,
    kill_tree,
    freeze_worker,
    stop_worker,
    kill_api,
    cancel_storm,
    poison_job,
    killing_job,
    repeat_messages,
)
PRODUCTION: tuple[Fault, ...] = (
    *COMMON,
    kill_redis,
    flush_redis,
    submit_without_redis,
    full_redis,
    freeze_redis_link,
    freeze_database_link,
    garbage_messages,
    restart_postgres,
    cut_database,
)
EMBEDDED: tuple[Fault, ...] = (*COMMON, garbage_files, second_service)
