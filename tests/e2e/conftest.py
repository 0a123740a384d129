"""A quick embedded service for the whole of a module, over models that it makes as `root`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmill_service.embedded.server import EmbeddedService
from bitmill_service.settings import ServiceSettings
from warm_python import FORKED


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[EmbeddedService]:
    settings = ServiceSettings(
        data=tmp_path_factory.mktemp("service") / "data",
        port=0,
        model_roots={"models": root},
        threads=1,
        lease_s=6,
        renew_s=1,
        poll_s=0.02,
        resend_s=1,
        reconcile_s=0.5,
        event_poll_s=0.05,
        collect_s=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FORKED.items():
            patch.setenv(name, value)
        with EmbeddedService(settings) as running:
            yield running
