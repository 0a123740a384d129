"""The API's description as one page of HTML: no script, nothing from another host.

FastAPI's own pages load scripts and pictures from public servers, and are blank without them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content-Security-Policy of the page."""

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 13px/1.45 monospace; background: #f3f3f0; }
pre { padding: .6rem; overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; }
td { border-top: 1px solid #ccc; padding: .2rem .8rem .2rem 0; vertical-align: top; }
details { border-top: 1px solid #999; padding: .4rem 0; }
summary { cursor: pointer; }
"""
_REFERENCE = re.compile(r"&quot;#/components/schemas/([\w.-]+)&quot;")


def docs_page(description: Mapping[str, Any]) -> str:
    """The page for an OpenAPI description."""
    info = description["info"]
    operations = [
        _operation(method.upper(), path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    types = [
        f'<details id="{escape(name)}"><summary>{escape(name)}</summary>{_json(schema)}</details>'
        for name, schema in sorted(description["components"]["schemas"].items())
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}'
        f"</title><style>{_STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f'<p>{_text(info["description"])}<p><a href="openapi.json">openapi.json</a> is the same '
        f"for programs.<h2>Calls</h2>{''.join(operations)}<h2>Types</h2>{''.join(types)}</html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    parameters = [
        (f"{one['name']} ({one['in']})", one.get("description", ""), one["schema"])
        for one in operation.get("parameters", ())
    ]
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{_text(text)}<td>{_json(schema)}"
        for name, text, schema in parameters
    ]
    for media, body in operation.get("requestBody", {}).get("content", {}).items():
        rows.append(f"<tr><td>body<td>{escape(media)}<td>{_json(body['schema'])}")
    answers = [
        f"<tr><td>{escape(status)}<td>{_text(answer['description'])}"
        for status, answer in sorted(operation["responses"].items())
    ]
    scopes = [scope for need in operation.get("security", ()) for scope in need.get("key", ())]
    needs = f" Needs a key with the scope `{scopes[0]}`." if scopes else ""
    return (
        f"<details><summary><code>{method} {escape(path)}</code></summary>"
        f"<p>{_text(operation.get('description', '') + needs)}<table>{''.join(rows)}</table>"
        f"<table>{''.join(answers)}</table></details>"
    )


def _text(text: str) -> str:
    """Plain text in which `code` and empty lines mean something."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return marked.replace("\n\n", "<p>")


def _json(schema: Mapping[str, Any]) -> str:
    text = escape(json.dumps(schema, indent=1))
    linked = _REFERENCE.sub(r'<a href="#\1">\1</a>', text)
    return f"<pre>{linked}</pre>"
