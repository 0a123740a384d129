"""SliM-LLM's group-precision files are read exactly; files that would run code are refused."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill.config.slim_llm import MAX_BYTES, read_slim_map
from bitmill.errors import FormatError

LAYERS = {
    0: {"self_attn.q_proj": [2, 3, 1, 2], "mlp.down_proj": [3] * 300},
    11: {"self_attn.q_proj": [1, 2, 3, 2], "mlp.down_proj": [2] * 300},
}


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_files_of_torch_save_are_read(tmp_path: Path, protocol: int, zipped: bool) -> None:
    path = saved(
        tmp_path / "opt-1.3b.pt",
        LAYERS,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    bit_widths = read_slim_map(path)
    assert dict(bit_widths.linears) == {
        f"model.layers.{layer}.{name}": tuple(widths)
        for layer, linears in LAYERS.items()
        for name, widths in linears.items()
    }
    assert bit_widths.order == "natural"


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "map.pkl"
    path.write_bytes(pickle.dumps({3: {"fc1": [4, 5, 6, 8]}}, protocol=protocol))
    bit_widths = read_slim_map(path, prefix="model.decoder.layers.{i}.")
    assert dict(bit_widths.linears) == {"model.decoder.layers.3.fc1": (4, 5, 6, 8)}


class Hostile:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_runs_code_is_refused_and_runs_nothing(
    tmp_path: Path, protocol: int, zipped: bool
) -> None:
    marker = tmp_path / "was-run"
    path = saved(
        tmp_path / "map.pt",
        {0: {"fc1": [2], "fc2": Hostile(marker)}},
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(FormatError, match="pickle opcode"):
        read_slim_map(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists(), "the file would have run its command"


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"0": {"fc1": [2]}},
        {-1: {"fc1": [2]}},
        {0: [2]},
        {0: {1: [2]}},
        {0: {"fc1": []}},
        {0: {"fc1": "22"}},
        {0: {"fc1": [True]}},
        {0: {"fc1": [[2]]}},
        {True: {"fc1": [2]}},
    ],
    ids=str,
)
def test_another_structure_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(FormatError, match="group-precision file is needed"):
        read_slim_map(saved(tmp_path / "map.pt", value))


@pytest.mark.parametrize("value", [OrderedDict({0: {"fc1": [2]}}), {0: {"fc1": torch.ones(2)}}])
def test_classes_and_tensors_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(FormatError, match="pickle opcode"):
        read_slim_map(saved(tmp_path / "map.pt", value))


@pytest.mark.parametrize("width", [-1, 9])
def test_widths_without_a_layout_are_refused(tmp_path: Path, width: int) -> None:
    with pytest.raises(FormatError, match=f"widths \\[{width}\\]"):
        read_slim_map(saved(tmp_path / "map.pt", {0: {"fc1": [2, width]}}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02}q\x00(K\x00",
        b"\x80\x02.",
        b"\x80\x02s.",
        b"\x80\x02e.",
        b"\x80\x02h\x05.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02]K\x01K\x02K\x03a.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 60) + b".",
        b"PK\x03\x04 not a zip",
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "map.pt"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="group-precision file is needed"):
        read_slim_map(path)


def test_a_memo_index_does_not_reserve_memory(tmp_path: Path) -> None:
    # Python's own reader would make a table of 2**32 entries for this one
    path = tmp_path / "map.pkl"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\xffK\x00}X\x01\x00\x00\x00a]K\x02ass.")
    assert dict(read_slim_map(path, prefix="{i}.").linears) == {"0.a": (2,)}


def test_zip_and_plain_files_over_the_limit_are_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(MAX_BYTES + 1))
    assert bomb.stat().st_size < 100_000
    plain = tmp_path / "plain.pt"
    plain.write_bytes(bytes(MAX_BYTES + 1))
    for path in (bomb, plain):
        with pytest.raises(FormatError, match="larger than"):
            read_slim_map(path)


def test_shared_lists_cannot_multiply_without_bound(tmp_path: Path) -> None:
    widths = [2] * 20_000
    linears = {f"fc{i}": widths for i in range(100)}
    path = saved(tmp_path / "map.pt", dict.fromkeys(range(100), linears))
    assert path.stat().st_size < MAX_BYTES
    with pytest.raises(FormatError, match="more than"):
        read_slim_map(path)


def test_a_zip_without_one_pickle_and_a_prefix_without_a_layer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.txt", "")
    with pytest.raises(FormatError, match="holds 0 pickles"):
        read_slim_map(path)
    with pytest.raises(FormatError, match=r"give \{i\}"):
        read_slim_map(path, prefix="model.layers.")
    with pytest.raises(FormatError, match="cannot be read"):
        read_slim_map(tmp_path / "absent.pt")
