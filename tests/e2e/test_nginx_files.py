"""Files that nginx sends for the service: the same answers as without it, and none of its bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from finished import Stack
from servers import free_port, listens
from serving import serve
from stores import wait_for

FILES = Path(__file__).parents[2] / "deploy" / "nginx-files.conf"
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
WEIGHTS = os.urandom(3_000_000)
_KEPT = ("etag", "repr-digest", "content-type", "content-disposition", "cache-control")
_FULL = """
pid {folder}/pid; error_log stderr; events {{}}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass {url}; proxy_set_header Host $http_host; }}
        include {folder}/files.conf;
    }}
}}
"""


class Served:
    """A job's weights by nginx and by the service itself."""

    def __init__(self, nginx: httpx2.Client, direct: httpx2.Client, path: str, place: str) -> None:
        self.nginx, self.direct, self.path, self.place = nginx, direct, path, place


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if not Path(NGINX).exists():
        pytest.skip("needs the Debian package nginx-light")
    folder = tmp_path_factory.mktemp("nginx")
    folder.chmod(0o755)
    data = folder / "data"
    given = ServiceSettings(data=data, accel_location="/files-of-the-service/")
    app = create_app(given)
    upgrade(app.state.context.database)
    port = free_port()
    (folder / "files.conf").write_text(FILES.read_text().replace("/srv/bitmill", str(data)))
    with serve(app) as url:
        stack = Stack(url, app.state.context)
        job = stack.succeeded(WEIGHTS)
        config = folder / "nginx.conf"
        config.write_text(_FULL.format(folder=folder, port=port, url=url))
        user = "user root;" if os.getuid() == 0 else ""
        with (folder / "log").open("wb") as log:
            nginx = subprocess.Popen(
                [NGINX, "-c", str(config), "-g", f"daemon off; {user}"], stdout=log, stderr=log
            )
        try:
            wait_for(lambda: listens(port), "nginx")
            with (
                httpx2.Client(base_url=f"http://127.0.0.1:{port}") as through,
                httpx2.Client(base_url=url) as direct,
            ):
                path = f"/v1/jobs/{job.id}/files/model.safetensors"
                yield Served(through, direct, path, f"{job.id}/{job.token}/model.safetensors")
        finally:
            nginx.terminate()
            nginx.wait(60)


def test_nginx_sends_the_bytes_and_the_service_none(served: Served) -> None:
    direct = served.direct.get(served.path)
    assert direct.content == b""
    assert direct.headers["x-accel-redirect"] == f"/files-of-the-service/{served.place}"
    found = served.nginx.get(served.path)
    assert (found.status_code, found.content) == (200, WEIGHTS)
    assert "x-accel-redirect" not in found.headers
    assert {name: found.headers[name] for name in _KEPT} == {
        name: direct.headers[name] for name in _KEPT
    }
    assert served.nginx.head(served.path).headers["content-length"] == str(len(WEIGHTS))


@pytest.mark.parametrize(
    ("headers", "status", "start", "end"),
    [
        ({"Range": "bytes=1000-1999"}, 206, 1000, 2000),
        ({"Range": "bytes=2999000-"}, 206, 2_999_000, 3_000_000),
        ({"Range": "bytes=-10"}, 206, 2_999_990, 3_000_000),
        ({"Range": "bytes=1000-1999", "If-Range": "ETAG"}, 206, 1000, 2000),
        ({"Range": "bytes=1000-1999", "If-Range": '"other"'}, 200, 0, 3_000_000),
        ({"Range": "bytes=0-1,5-6"}, 200, 0, 3_000_000),
        ({"If-Match": "ETAG"}, 200, 0, 3_000_000),
        ({"If-None-Match": '"other"'}, 200, 0, 3_000_000),
    ],
)
def test_ranges_and_conditions_are_held(
    served: Served, headers: dict[str, str], status: int, start: int, end: int
) -> None:
    etag = served.nginx.head(served.path).headers["etag"]
    sent = {name: value.replace("ETAG", etag) for name, value in headers.items()}
    found = served.nginx.get(served.path, headers=sent)
    assert (found.status_code, found.content) == (status, WEIGHTS[start:end])
    assert found.headers["etag"] == etag


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Range": "bytes=3000000-"}, 416),
        ({"If-None-Match": "ETAG"}, 304),
        ({"If-Match": '"other"'}, 412),
    ],
)
def test_what_sends_no_bytes_is_the_services_answer(
    served: Served, headers: dict[str, str], status: int
) -> None:
    etag = served.nginx.head(served.path).headers["etag"]
    sent = {name: value.replace("ETAG", etag) for name, value in headers.items()}
    found = served.nginx.get(served.path, headers=sent)
    assert found.status_code == status
    if status > 400:
        assert found.headers["content-type"] == "application/problem+json"


def test_nobody_reaches_the_files_past_the_service(served: Served) -> None:
    for path in (served.place, f"../artifacts/{served.place}", ""):
        assert served.nginx.get(f"/files-of-the-service/{path}").status_code == 404
