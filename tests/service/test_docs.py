"""The documentation of commands and routes says what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitmill_service.cli.docs import pages
from bitmill_service.http.problems import CODES
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings

DOCS = Path(__file__).parents[2] / "docs"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="runs in a source tree")


def test_command_line_page_is_fresh() -> None:
    written = (DOCS / "cli.md").read_text()
    assert written == "\n".join(pages()), "run `python -m bitmill_service.cli.docs > docs/cli.md`"


def test_api_page_names_every_route_and_no_other(tmp_path: Path) -> None:
    app = create_app(ServiceSettings(data=tmp_path))
    described = app.openapi()["paths"]
    routes = {f"{m.upper()} {path}" for path, methods in described.items() for m in methods}
    app.state.context.database.close()
    table = re.findall(r"^\| `([A-Z]+ /\S+)` \|", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert set(table) == routes | {"GET /metrics"}


def test_operations_page_names_every_setting_and_its_default() -> None:
    """Defaults that are no plain value, such as a folder, are described in words."""
    rows = re.findall(r"^\| (`BITMILL_.*?) \| (.*?) \|", (DOCS / "operations.md").read_text(), re.M)
    described: dict[str, str] = {}
    for names, values in rows:
        named = re.findall(r"BITMILL_([A-Z0-9_]+)", names)
        defaults = values.split(", ") if len(values.split(", ")) == len(named) else [values]
        described |= dict(zip(named, defaults * len(named), strict=False))
    internal = {"runner_module"}
    fields = ServiceSettings.model_fields
    assert {name.upper() for name in fields.keys() - internal} - described.keys() == set()
    for name, field in fields.items():
        if type(field.default) in (int, float) and field.default < 1 << 20 and name not in internal:
            assert described[name.upper()] == f"{field.default:g}", name


def test_api_page_names_every_code_with_its_status() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.*) \|$", (DOCS / "api.md").read_text(), re.M)
    assert {code: (int(status), hint) for code, status, hint in rows} == dict(CODES)


def test_links_between_pages_and_files_lead_somewhere() -> None:
    """Of every page; anchors of the site's pages are checked where it is built (`scripts/site`)."""
    root = DOCS.parent
    pages = [*root.glob("*.md"), *DOCS.glob("*.md"), *root.glob("*/README.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if not re.match(r"[a-z]+:", link)
    ]
    assert len(links) > 50
    assert [f"{p.name}: {to}" for p, to in links if not (p.parent / to).exists()] == []
