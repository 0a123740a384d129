"""The artifact store that the settings name."""

from __future__ import annotations

from bitmill_workers.settings import Settings
from bitmill_workers.storage.artifacts import ArtifactStore
from bitmill_workers.storage.local import LocalArtifacts


def open_artifacts(settings: Settings, *, for_clients: bool = False) -> ArtifactStore:
    """The artifact store that the settings name; `for_clients` as in `S3Artifacts`."""
    if settings.s3_bucket is None:
        return LocalArtifacts(settings.artifacts_folder)
    from bitmill_workers.storage.s3 import S3Artifacts

    return S3Artifacts(settings, for_clients=for_clients)
