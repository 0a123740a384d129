"""Bytes as people write and read them."""

from __future__ import annotations

from bitmill.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, param: str = "--size") -> int:
    """Bytes of a size such as 120000000, 120MB, 1.5GB or 512MiB; raises `InputError`."""
    digits = text.strip().rstrip("BbKkMmGgTtIi ")
    unit = text.strip()[len(digits) :].strip().upper()
    factor = (_UNITS | _BINARY).get(unit)
    try:
        value = float(digits) * factor if factor else -1.0
    except ValueError:
        value = -1.0
    if not 1 <= value < float("inf"):
        raise InputError(
            f"{text!r} is no size: give bytes, or a number with kB, MB, GB, TB, MiB or GiB",
            param=param,
        )
    return int(value)


def format_size(size: int) -> str:
    """Bytes in decimal units: 97.6 MB."""
    if size < 1000:
        return f"{size} B"
    for unit in ("kB", "MB", "GB", "TB"):
        size_in_unit = size / 1000 ** ("kB", "MB", "GB", "TB").index(unit) / 1000
        if size_in_unit < 999.95 or unit == "TB":
            return f"{size_in_unit:.1f} {unit}"
    raise AssertionError("unreachable: the last unit always answers")
