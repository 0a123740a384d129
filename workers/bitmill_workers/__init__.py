"""Job store, claims and leases, Celery app, supervisor, runner, fetching and artifact storage."""
