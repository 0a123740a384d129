"""Readers of strangers' files take damage of any kind: an answer or a refusal by name, within 2 s.

Each input is a sound file that Hypothesis has damaged in a few places: bytes changed, cut, doubled
or put in, values of JSON replaced, removed or nested, names doubled. CI tries some inputs, always
the same; by hand

    BITMILL_FUZZ_EXAMPLES=20000 scripts/test -n 2 tests/quant_core/test_hostile_readers.py

tries others. What it found is in `benchmarks/results/fuzz_readers.md`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Budget, QuantizationConfig
from bitmill.errors import BitmillError
from bitmill.formats.packed.checkpoint import PackedCheckpoint
from bitmill.formats.packed.complete import check_complete
from bitmill.io.gguf import read_gguf_header
from bitmill.plan.model_plan import make_plan
from gguf_files import write_gguf
from golden_model import EMBEDDING, SHAPES
from pace import limit
from tiny import tiny_llama

EXAMPLES = int(os.environ.get("BITMILL_FUZZ_EXAMPLES", "0"))
SPEC = QuantizationConfig(budget=Budget(bits=4))
GOLDEN = Path(__file__).parents[1] / "golden"
_SECONDS = 5.0

tried = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**62,
        2**64,
        10**400,
        1.5,
        -0.0,
        1e308,
        "",
        "a",
        "\0",
        "\x1b[2J",
    ),
    *("../x", "9" * 5000, "\ud800", "ö", [], {}, [[]], [1, 2], {"a": {}}, ["x"] * 300, [0] * 5000),
]
edits = st.lists(
    st.tuples(st.sampled_from(("set", "cut", "double", "end")), st.integers(0, 2**40), st.binary()),
    min_size=1,
    max_size=3,
)
changes = st.lists(
    st.tuples(
        st.sampled_from(("replace", "remove", "rename", "nest")),
        st.integers(0, 2**40),
        st.sampled_from(VALUES),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, done: list[tuple[str, int, bytes]]) -> bytes:
    """Bytes with edits at places that are taken modulo the length."""
    for what, number, put in done:
        place = number % (len(data) + 1)
        if what == "set":
            data = data[:place] + put + data[place + len(put) :]
        elif what == "cut":
            data = data[:place] + data[place + 1 + number % 97 :]
        elif what == "double":
            data = data[:place] + data[max(0, place - 1 - number % 97) : place] + data[place:]
        else:
            data = data[:place]
    return data


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def changed(value: Any, done: list[tuple[str, int, Any]]) -> Any:
    """JSON with values replaced, removed, put under another name, or nested."""
    value = {"": copy.deepcopy(value)}
    for what, number, put in done:
        found = list(places(value))
        holder, key = found[number % len(found)]
        if what == "replace":
            holder[key] = copy.deepcopy(put)
        elif what == "remove" and key != "":
            del holder[key]
        elif what == "rename" and isinstance(holder, dict) and key != "":
            holder[str(put)] = holder.pop(key)
        else:
            holder[key] = [holder[key]] * (number % 5)
    return value[""]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def with_header(file: bytes, done: list[tuple[str, int, Any]]) -> bytes:
    """A safetensors file whose header was changed as JSON, its length right."""
    length = int.from_bytes(file[:8], "little")
    header = as_json(changed(json.loads(file[8 : 8 + length]), done))
    return len(header).to_bytes(8, "little") + header + file[8 + length :]


def answered(read: Callable[[], object]) -> None:
    """It returns, or refuses in one line that a terminal can show; never for long."""
    started = time.process_time()
    said = ""
    try:
        read()
    except BitmillError as error:
        said = f"{error.message}{error.param or ''}"
    spent = time.process_time() - started
    assert spent < _SECONDS or spent < limit(_SECONDS)
    assert said.isprintable()
    assert len(said) < 5000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and the same as a GGUF file."""
    folder = tiny_llama(tmp_path_factory.mktemp("hostile") / "tiny")
    write_gguf(folder / "tiny.gguf", folder)
    return folder


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def sharded(place: Path) -> Path:
    """The same with an index."""
    (place / "model.safetensors").rename(place / "one.safetensors")
    return place


@tried
@given(edits, changes, st.booleans())
def test_safetensors(model: Path, place: Path, cuts: Any, done: Any, header: bool) -> None:
    whole = (model / "model.safetensors").read_bytes()
    data = with_header(whole, done) if header else damaged(whole[:9000], cuts) + whole[9000:]
    (place / "model.safetensors").write_bytes(data)
    answered(lambda: make_plan(place, SPEC))


@tried
@given(edits, changes, st.booleans())
def test_index(sharded: Path, cuts: Any, done: Any, parsed: bool) -> None:
    names = {name: "one.safetensors" for name in ("model.norm.weight", "model.embed_tokens.weight")}
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    data = as_json(changed(index, done)) if parsed else damaged(as_json(index), cuts)
    (sharded / "model.safetensors.index.json").write_bytes(data)
    answered(lambda: make_plan(sharded, SPEC))


@tried
@given(edits, changes, st.booleans())
def test_config(model: Path, place: Path, cuts: Any, done: Any, parsed: bool) -> None:
    whole = (model / "config.json").read_bytes()
    data = as_json(changed(json.loads(whole), done)) if parsed else damaged(whole, cuts)
    (place / "config.json").write_bytes(data)
    answered(lambda: make_plan(place, SPEC))


@tried
@given(edits)
def test_gguf(model: Path, place: Path, cuts: Any) -> None:
    whole = (model / "tiny.gguf").read_bytes()
    end = min(t.begin for t in read_gguf_header(model / "tiny.gguf").tensors.values())
    (place / "tiny.gguf").write_bytes(damaged(whole[:end], cuts) + whole[end:])

    def read() -> None:
        make_plan(place, SPEC, gguf="tiny.gguf")
        read_gguf_header(place / "tiny.gguf", whole=("tokenizer.ggml.tokens",)).check_extent()

    answered(read)


@tried
@given(edits, changes, st.booleans())
def test_map(tmp_path: Path, cuts: Any, done: Any, parsed: bool) -> None:
    whole = (GOLDEN / "map-v1.json").read_bytes()
    path = tmp_path / "map.json"
    path.write_bytes(as_json(changed(json.loads(whole), done)) if parsed else damaged(whole, cuts))
    answered(lambda: BitWidthMap.load(path).check_shapes(SHAPES))


@pytest.mark.parametrize("version", ["packed-v1", "packed-v2", "packed-v4"])
@tried
@given(st.sampled_from(("config.json", "model.safetensors", "data")), edits, changes)
def test_packed(tmp_path: Path, version: str, which: str, cuts: Any, done: Any) -> None:
    folder = tmp_path / version
    shutil.copytree(GOLDEN / version, folder, dirs_exist_ok=True)
    file = folder / ("model.safetensors" if which == "data" else which)
    whole = file.read_bytes()
    if which == "config.json":
        file.write_bytes(as_json(changed(json.loads(whole), done)))
    elif which == "model.safetensors":
        file.write_bytes(with_header(whole, done))
    else:
        file.write_bytes(damaged(whole, cuts))

    def read() -> None:
        checkpoint = PackedCheckpoint.open(folder)
        shapes = (*SHAPES, EMBEDDING) if version == "packed-v4" else SHAPES
        checkpoint.check_linears(shapes)
        for shape in shapes:
            if shape.name in checkpoint.config.linears:
                checkpoint.linear(shape)

    answered(read)
    answered(lambda: check_complete(folder))
