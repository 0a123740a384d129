"""Predicted sizes equal the files that the safetensors library writes."""

import pytest
import torch
from safetensors.torch import save_file

from bitmill.errors import InputError
from bitmill.io.safetensors_layout import (
    METADATA,
    TensorSpec,
    checkpoint_bytes,
    header,
    header_bytes,
    shard,
)

DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}


def spec(name, tensor):
    return TensorSpec(name, DTYPES[tensor.dtype], tuple(tensor.shape))


@pytest.mark.parametrize("count", [1, 3, 17])
def test_bytes_equal_the_written_file(tmp_path, count):
    generator = torch.Generator().manual_seed(count)
    tensors = {}
    for i in range(count):
        for j, dtype in enumerate(DTYPES):
            shape = torch.randint(1, 60, (1 + (i + j) % 3,), generator=generator).tolist()
            tensors[f"block.{i}.t{(7 * j) % 10}"] = torch.zeros(shape, dtype=dtype)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata=METADATA)
    specs = [spec(name, tensor) for name, tensor in tensors.items()]
    assert checkpoint_bytes(specs) == path.stat().st_size
    raw = path.read_bytes()
    assert header_bytes(specs) == 8 + int.from_bytes(raw[:8], "little")


def test_odd_names_and_scalars_are_counted():
    names = ["plain", 'quo"te', "back\\slash", "ümlaut", "tab\t", ""]
    for shape in ((), (3, 40), (0,)):
        tensors = [TensorSpec(name, "F32", shape) for name in names]
        assert header_bytes(tensors) == len(header(tensors)[0])
        assert [header_bytes([t]) for t in tensors] == [len(header([t])[0]) for t in tensors]


def test_shards_keep_the_order_and_the_limit():
    tensors = [TensorSpec(f"t{i}", "U8", (40,)) for i in range(5)] + [
        TensorSpec("big", "F32", (99,))
    ]
    parts = shard(tensors, 100)
    assert list(parts) == [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [t.name for part in parts.values() for t in part] == [t.name for t in tensors]
    assert [len(part) for part in parts.values()] == [2, 2, 1, 1]
    assert list(shard(tensors, 10**6)) == ["model.safetensors"]


def test_a_name_that_stands_twice_is_refused():
    with pytest.raises(InputError, match="'a' stands twice"):
        checkpoint_bytes([TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (1,))])
