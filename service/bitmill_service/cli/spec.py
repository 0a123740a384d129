"""A job specification from command-line options.

MODEL is `path:ROOT/FOLDER` (below one of the service's model roots) or a Hub repository,
`ORG/NAME` or `ORG/NAME@REVISION`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from bitmill.errors import SpecError
from bitmill_service.cli.output import parse_size
from bitmill_workers.job_spec import JobSpec, parse_spec


def model_reference(model: str, file: str | None) -> dict[str, Any]:
    """The JSON model reference that MODEL stands for."""
    reference: dict[str, Any]
    if model.startswith("path:"):
        reference = {"source": "path", "path": model.removeprefix("path:")}
    else:
        repo, _, revision = model.removeprefix("hub:").partition("@")
        reference = {"source": "hub", "repo_id": repo}
        if revision:
            reference["revision"] = revision
    if file is not None:
        reference["file"] = file
    return reference


def parameters_reference(given: str | None) -> dict[str, Any]:
    """The JSON reference to learned parameters: of a job, or of a folder as `path:...`."""
    if given is None:
        return {}
    if given.startswith("path:"):
        return {"source": "path", "path": given.removeprefix("path:")}
    return {"source": "job", "job_id": given}


def budget(code_bits: float | None, bits: float | None, size: str | None) -> dict[str, Any]:
    """The JSON budget; `parse_spec` refuses none or two."""
    given: dict[str, Any] = {"code_bits": code_bits, "bits": bits}
    given["size"] = None if size is None else parse_size(size)
    return {key: value for key, value in given.items() if value is not None}


def read_spec(path: str) -> dict[str, Any]:
    """A specification from a JSON file, or from standard input for `-`."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        loaded = json.loads(text)
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read as JSON: {error}", param="--spec") from error
    if not isinstance(loaded, dict):
        raise SpecError(f"{path} holds no JSON object", param="--spec")
    return loaded


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the given (not None) leaves of `changes` put in."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict):
            inner = merge(merged.get(key) or {}, value)
            if inner:
                merged[key] = inner
        elif value is not None:
            merged[key] = value
    return merged


def build_spec(
    model: str | None,
    spec: str | None,
    *,
    file: str | None,
    budget_part: dict[str, Any],
    changes: dict[str, Any],
) -> JobSpec:
    """The specification of the file, if any, with the options' values in place of its own."""
    base = read_spec(spec) if spec is not None else {}
    if model is not None:
        base["model"] = model_reference(model, file)
    elif "model" not in base:
        raise typer.BadParameter("give MODEL, or --spec with a model")
    if budget_part:
        base["budget"] = budget_part
    return parse_spec(merge(base, changes))
