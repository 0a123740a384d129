"""Gauges that are read from the job store when Prometheus asks, so every replica says the same."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from bitmill_service.settings import ServiceSettings
from bitmill_workers.catalog import Catalog
from bitmill_workers.jobs import JobStore
from bitmill_workers.states import STATES


class StoreCollector(Collector):
    """Jobs by state, live workers and free disk."""

    def __init__(self, jobs: JobStore, catalog: Catalog, settings: ServiceSettings) -> None:
        self._jobs, self._catalog, self._settings = jobs, catalog, settings

    def collect(self) -> Iterator[Metric]:
        """Read everything now."""
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
        free = shutil.disk_usage(self._settings.data).free
        yield GaugeMetricFamily("bitmill_disk_free_bytes", "Free in the data folder", value=free)


def new_registry(jobs: JobStore, catalog: Catalog, settings: ServiceSettings) -> CollectorRegistry:
    """A registry of this app's own, so that several apps can live in one process."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(jobs, catalog, settings))
    return registry
