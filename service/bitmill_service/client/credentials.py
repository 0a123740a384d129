"""API keys that the client finds by itself: `BITMILL_API_KEY`, or what `bitmill login` kept.

Kept keys lie in one JSON file, by the service's address, readable by its owner alone:
`$BITMILL_CREDENTIALS`, else `$XDG_CONFIG_HOME/bitmill/credentials.json`, else below ~/.config.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from bitmill.errors import InputError


def credentials_file() -> Path:
    """Where kept keys lie."""
    if given := os.environ.get("BITMILL_CREDENTIALS"):
        return Path(given)
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "bitmill" / "credentials.json"


def find_key(url: str) -> str | None:
    """The key for the service at this address, or None.

    Raises `InputError` where the file of keys is damaged, or can be read by others.
    """
    return os.environ.get("BITMILL_API_KEY", "").strip() or _kept().get(url)


def keep_key(url: str, key: str | None) -> Path:
    """Keep the key for this address, or forget what is kept where it is None; the file."""
    kept = _kept()
    kept.pop(url, None)
    if key is not None:
        kept[url] = key
    file = credentials_file()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        json.dump({"keys": kept}, out, indent=1)
    scratch.rename(file)
    return file


def _kept() -> dict[str, str]:
    file = credentials_file()
    try:
        mode = file.stat().st_mode
        text = file.read_bytes()
    except FileNotFoundError:
        return {}
    if stat.S_IMODE(mode) & 0o077:
        raise InputError(
            f"{file} holds API keys and can be read by others (mode {stat.S_IMODE(mode):o}): "
            f"run `chmod 600 {file}`",
            code="credentials_exposed",
            param=str(file),
        )
    try:
        keys = json.loads(text)["keys"]
        return {str(url): str(key) for url, key in keys.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is no file of API keys: remove it and run `bitmill login` again",
            code="bad_credentials",
            param=str(file),
        ) from error
