"""A specification from what a command was given: references, files, and options over both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bitmill.config.references import read_map
from bitmill.errors import SpecError, reason
from bitmill.io import bounded_json
from bitmill_workers.job_spec import JobSpec, parse_spec

Given = dict[str, Any]
"""Path of a field, e.g. "calibration.held_out" -> JSON value, for every option that was given."""


def put(spec: dict[str, Any], given: Given) -> dict[str, Any]:
    """The specification with what was given in place of its own values; `spec` is changed."""
    if any(path.startswith("budget.") for path in given):
        spec["budget"] = {}
    for path, value in given.items():
        *parents, name = path.split(".")
        part = spec
        for parent in parents:
            inner = part.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise SpecError(f"{parent} must be an object in the specification", param=parent)
            part = inner
        part[name] = value
    return spec


def build_spec(model: dict[str, Any] | None, file: str | None, given: Given) -> JobSpec:
    """The specification of the file, if any, with the model and what was given in its place."""
    spec = read_spec(file)
    if model is not None:
        spec["model"] = model
    elif "model" not in spec:
        raise SpecError("name the model: give MODEL, or --spec with one", param="model")
    put(spec, given)
    if not spec.get("budget"):
        raise SpecError(
            "name a budget: give one of --bits, --code-bits, --size, --memory and --max-loss, or "
            "--spec with one",
            param="budget",
        )
    part_of_text = any(path.startswith("calibration.text.") for path in given)
    if part_of_text and "source" not in spec["calibration"]["text"]:
        raise SpecError(
            "a field, configuration or split needs its text: give --calibration-text too",
            param="calibration.text",
        )
    return parse_spec(spec)


def read_spec(file: str | None) -> dict[str, Any]:
    """The specification of a JSON file, or of standard input for `-`; an empty one for None."""
    if file is None:
        return {}
    try:
        loaded = bounded_json.loads(
            sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        )
    except (OSError, ValueError) as error:
        raise SpecError(
            f"{file} cannot be read as JSON: {reason(error)}", param="--spec"
        ) from error
    if not isinstance(loaded, dict):
        raise SpecError(f"{file} holds no JSON object", param="--spec")
    return loaded


def comma_separated(text: str) -> tuple[str, ...]:
    """The items of an option that takes several values."""
    return tuple(item.strip() for item in text.split(","))


def map_file(text: str) -> dict[str, Any]:
    """A local map, sent inline."""
    return {"source": "inline", "map": read_map(Path(text))}


def map_reference(text: str) -> dict[str, Any]:
    """`job:ID`, `upload:ID`, or a local map."""
    source, _, name = text.partition(":")
    key = {"job": "job_id", "upload": "map_id"}.get(source)
    return map_file(text) if key is None else {"source": source, key: name}


def parameters_folder(text: str) -> dict[str, Any]:
    """The folder of learned parameters."""
    return {"source": "path", "path": text}


def parameters_reference(text: str) -> dict[str, Any]:
    """Learned parameters: of a job, `path:ROOT/FOLDER` of the service, or `upload:ID`."""
    if text.startswith("upload:"):
        return {"source": "upload", "upload_id": text.removeprefix("upload:")}
    if text.startswith("path:"):
        return parameters_folder(text.removeprefix("path:"))
    return {"source": "job", "job_id": text.removeprefix("job:")}


def local_folder(text: str) -> Path | None:
    """The folder or GGUF file on this machine that a model is given as: `./FOLDER`, `/FOLDER`."""
    here = text.startswith(("./", "../", "/", "~")) or text in (".", "..")
    return Path(text).expanduser() if here else None


def model_reference(text: str) -> dict[str, Any]:
    """`path:ROOT/FOLDER`, `upload:ID`, or a Hub repository `ORG/NAME[@REVISION]`."""
    source, _, name = text.partition(":")
    if source in ("path", "upload"):
        return {"source": source, "path" if source == "path" else "upload_id": name}
    repo, _, revision = text.removeprefix("hub:").partition("@")
    return {"source": "hub", "repo_id": repo} | ({"revision": revision} if revision else {})
