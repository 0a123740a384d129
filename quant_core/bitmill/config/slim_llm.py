"""Published SliM-LLM group-precision files, read without executing anything. Torch-free.

The files are `torch.save` output, a zip with a pickle inside (older ones: bare pickles), of

    {int layer: {str linear: [int width, one per 128 input columns]}}

A pickle is a program; Python's own reader can be made to call anything, and even a reader that
refuses calls can be made to reserve gigabytes. So the opcodes are walked here, and only those
that build dicts, lists, strings, ints and bools are known; any other refuses the file.

Layout of the files: https://huggingface.co/AaronHuangWei/SliM-LLM_group-precision
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.errors import FormatError, reason

MAX_BYTES = 16 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_OBJECT = 3
_MARK = object()


def read_slim_map(path: Path, *, prefix: str = "model.layers.{i}.") -> BitWidthMap:
    """Read a group-precision file into a map over full linear names.

    prefix: what stands before a linear's name, `{i}` being the layer; OPT has
    "model.decoder.layers.{i}.".

    Raises FormatError for a file over 16 MiB, one that is not such a dict, or one that wants code
    to run.
    """
    if "{i}" not in prefix:
        raise FormatError(f"prefix {prefix!r} does not say where the layer goes: give {{i}}")
    layers = _read_pickle(_pickle_bytes(path), path.name)
    linears = dict(_named_widths(layers, prefix, path.name))
    try:
        return BitWidthMap(linears=linears)
    except ValidationError as error:
        raise FormatError(f"{path.name}: {reason(error)}", param=path.name) from error


def _pickle_bytes(path: Path) -> bytes:
    """The pickle of a file: the `data.pkl` of a zip, or the file itself."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as plain:
                return _limited(plain, path.name)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(names) != 1:
                raise _refusal(path.name, f"holds {len(names)} pickles, expected one")
            with archive.open(names[0]) as member:
                return _limited(member, path.name)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise _refusal(path.name, f"cannot be read: {error}") from error


def _limited(stream: Any, name: str) -> bytes:
    data: bytes = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _refusal(name, f"is larger than {MAX_BYTES} bytes")
    return data


def _read_pickle(data: bytes, name: str) -> Any:
    """The object of a pickle, or the fourth of the five pickles of an old torch file."""
    stream = io.BytesIO(data)
    first = _next_object(stream, name)
    if type(first) is int and first == _LEGACY_MAGIC:
        for _ in range(_LEGACY_OBJECT):
            first = _next_object(stream, name)
    return first


def _next_object(stream: io.BytesIO, name: str) -> Any:
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            step = _STEPS.get(opcode.name)
            if step is None:
                raise _refusal(name, f"uses pickle opcode {opcode.name}, which is not plain data")
            step(machine, argument)
        (value,) = machine.stack
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(name, f"is not a sound pickle: {error}") from error
    return value


class _Machine:
    """Stack and memo of the pickle reader."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Pop everything above the topmost mark, and the mark."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise ValueError("no mark on the stack")

    def extend(self, items: list[Any]) -> None:
        """Append to the list on top of the stack."""
        if type(self.stack[-1]) is not list:
            raise TypeError("append to what is not a list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Set keys and values, in turn, in the dict on top of the stack."""
        if type(self.stack[-1]) is not dict:
            raise TypeError("item set in what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (int, str):
                raise TypeError("dict key that is neither int nor str")
            self.stack[-1][key] = value

    def take(self, count: int) -> list[Any]:
        """Pop the last `count` values."""
        items = self.stack[-count:]
        del self.stack[-count:]
        return items


def _ignore(machine: _Machine, argument: Any) -> None:
    """PROTO, FRAME and STOP carry no data."""


def _push(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _memoize(machine: _Machine, argument: Any) -> None:
    index = len(machine.memo) if argument is None else int(argument)
    machine.memo[index] = machine.stack[-1]


_Step = Callable[[_Machine, Any], None]
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _ignore),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"), _push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE"), _push),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, a: m.push(m.memo[int(a)])),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "MARK": lambda m, _: m.push(_MARK),
    "APPEND": lambda m, _: m.extend(m.take(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.update(m.take(2)),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
}


def _named_widths(layers: Any, prefix: str, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    if type(layers) is not dict or not layers:
        raise _refusal(name, "does not hold a dict of layers")
    budget = MAX_BYTES
    for layer, linears in layers.items():
        if type(layer) is not int or layer < 0 or type(linears) is not dict:
            raise _refusal(name, f"has {layer!r}, expected a layer number with a dict of linears")
        for linear, widths in linears.items():
            if type(linear) is not str or not _plain_widths(widths):
                raise _refusal(name, f"has in layer {layer} a linear without a list of widths")
            budget -= len(widths)
            if budget < 0:
                raise _refusal(name, f"names more than {MAX_BYTES} groups")
            yield prefix.replace("{i}", str(layer)) + linear, tuple(widths)


def _plain_widths(widths: Any) -> bool:
    return type(widths) is list and bool(widths) and all(type(w) is int for w in widths)


def _refusal(name: str, problem: str) -> FormatError:
    return FormatError(f"{name} {problem}: a SliM-LLM group-precision file is needed", param=name)
