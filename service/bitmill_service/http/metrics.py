"""Gauges that are read from the job store when Prometheus asks, so every replica says the same."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from bitmill_service.settings import ServiceSettings
from bitmill_workers.settings import TIERS
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import DATABASE_ERRORS
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.records import WorkerRecord
from bitmill_workers.store.states import STATES
from bitmill_workers.store.stats import QueueStats, read_stats

_log = logging.getLogger(__name__)


class StoreCollector(Collector):
    """Free disk, and jobs by state and live workers while the database answers."""

    def __init__(self, jobs: JobStore, catalog: Catalog, settings: ServiceSettings) -> None:
        self._jobs, self._catalog, self._settings = jobs, catalog, settings

    def collect(self) -> Iterator[Metric]:
        """Read everything now."""
        free = shutil.disk_usage(self._settings.data).free
        yield GaugeMetricFamily("bitmill_disk_free_bytes", "Free in the data folder", value=free)
        found: list[Metric] = []
        try:
            found = list(self._store_metrics())
        except DATABASE_ERRORS as error:
            _log.warning("metrics without those of jobs, the job store failed: %s", error)
        up = float(bool(found))
        yield GaugeMetricFamily("bitmill_database_up", "Whether the database answers", value=up)
        yield from found

    def _store_metrics(self) -> Iterator[Metric]:
        counts = self._jobs.counts()
        jobs = GaugeMetricFamily("bitmill_jobs", "Jobs by state", labels=["state"])
        for state in STATES:
            jobs.add_metric([state], counts.get(state, 0))
        yield jobs
        live = self._catalog.workers()
        yield GaugeMetricFamily("bitmill_workers_live", "Workers seen lately", value=len(live))
        silent = GaugeMetricFamily(
            "bitmill_worker_silent_seconds", "Since a worker's last sign of life", labels=["worker"]
        )
        for worker in live:
            silent.add_metric([worker.name], max(0.0, time.time() - worker.last_seen))
        yield silent
        yield from self._queue_metrics(live)

    def _queue_metrics(self, live: Sequence[WorkerRecord]) -> Iterator[Metric]:
        stats = read_stats(self._jobs.database)
        depth = GaugeMetricFamily("bitmill_queue_depth", "Runnable jobs", labels=["queue"])
        oldest = GaugeMetricFamily(
            "bitmill_queue_oldest_seconds", "Wait of the oldest runnable job", labels=["queue"]
        )
        running = GaugeMetricFamily("bitmill_jobs_running", "Active jobs", labels=["queue"])
        consumers = GaugeMetricFamily("bitmill_queue_workers", "Live workers", labels=["queue"])
        for queue in TIERS:
            found = stats.queues.get(queue, QueueStats(0, 0.0))
            depth.add_metric([queue], found.depth)
            oldest.add_metric([queue], found.oldest_s)
            running.add_metric([queue], stats.running.get(queue, 0))
            consumers.add_metric([queue], sum(queue in worker.queues for worker in live))
        stages = GaugeMetricFamily(
            "bitmill_job_stage_seconds", "Mean of the last jobs that succeeded", labels=["stage"]
        )
        for stage, seconds in stats.stage_s.items():
            stages.add_metric([stage], seconds)
        yield from (depth, oldest, running, consumers, stages)
        for name, meaning, value in (
            ("enqueue_lag_seconds", "Wait of the oldest job not yet announced", stats.unsent_s),
            ("job_attempts", "Attempts of all stored jobs", stats.attempts),
            ("leases_lost", "Leases that expired", stats.leases_lost),
            ("runner_crashes", "Runners that died", stats.runner_crashes),
            ("jobs_handed_back", "Jobs returned by stopping workers", stats.handed_back),
            ("fenced_writes", "Writes refused for a stale token", stats.fenced_writes),
            ("webhooks_waiting", "Webhooks not yet taken", stats.webhooks_waiting),
            ("artifact_bytes", "Published files", stats.artifact_bytes),
        ):
            yield GaugeMetricFamily(f"bitmill_{name}", meaning, value=value)


def new_registry(jobs: JobStore, catalog: Catalog, settings: ServiceSettings) -> CollectorRegistry:
    """A registry of this app's own, so that several apps can live in one process."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(jobs, catalog, settings))
    return registry
