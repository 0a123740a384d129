"""Errors arrive as they left, and what the machine refuses is told as what it is."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bitmill.config.quantization import Budget
from bitmill.errors import (
    BitmillError,
    InputError,
    ModelError,
    ProcessFailed,
    ResourceError,
    as_bitmill_error,
    asked_bytes,
    raise_resource_error,
    reason,
)


def classes(kind: type[BitmillError] = BitmillError) -> list[type[BitmillError]]:
    below = [c for c in kind.__subclasses__() if c.__module__ == "bitmill.errors"]
    return [kind, *(found for c in below for found in classes(c))]


def members(error: BitmillError) -> tuple[object, ...]:
    return type(error), error.code, error.message, str(error), error.param, error.hint


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_class_arrives_as_it_left(kind: type[BitmillError]) -> None:
    for error in (
        kind("it is 3, at most 2 is possible: give less"),
        kind("é\n\0", code="of_its_own", param="a.b", hint="Do this."),
    ):
        told = json.loads(json.dumps(error.to_dict()))
        assert told.keys() == {"kind", "code", "message", "param", "hint"}
        assert members(BitmillError.from_dict(told)) == members(error)


def test_every_class_says_what_to_do() -> None:
    hints = [kind("x").hint for kind in classes()[1:]]
    assert all(hint and hint.endswith(".") for hint in hints)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("InputError.ModelError.TooNew", ModelError),
        ("InputError.TooNew.Newer", InputError),
        ("TooNew", BitmillError),
        (None, BitmillError),
        ("os.system", BitmillError),
    ],
)
def test_class_of_a_newer_version_arrives_as_its_nearest_known_base(
    kind: str | None, known: type[BitmillError]
) -> None:
    told = {"kind": kind, "code": "newer", "message": "m", "param": "p", "hint": "h"}
    assert members(BitmillError.from_dict(told)) == (known, "newer", "m", "m", "p", "h")


def test_error_told_with_too_little_is_still_one() -> None:
    error = BitmillError.from_dict({"kind": "ResourceError", "param": 7})
    assert members(error)[:3] == (ResourceError, "resource", "no reason was given")
    assert (error.param, error.hint) == ("7", ResourceError.hint)


@pytest.mark.parametrize(
    "act",
    [
        lambda: torch.empty(1 << 48),
        lambda: np.empty(1 << 50),
        lambda: bytearray(1 << 60),
        lambda: [None] * (1 << 60),
    ],
    ids=["torch", "numpy", "bytes", "list"],
)
def test_refused_memory_is_out_of_memory_whoever_asks(act: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as refused:
        act()
    told = as_bitmill_error(refused.value)
    assert (type(told), told.code) == (ResourceError, "out_of_memory")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "MPS backend out of memory (MPS allocated: 1.00 GB)",
        "NCCL error: ncclUnhandledCudaError ... Cuda failure 2 'out of memory'",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "unable to mmap 4096 bytes from file <model.safetensors>: Cannot allocate memory (12)",
        "std::bad_alloc",
        "can't start new thread",
        "The global thread pool has not been initialized.: ThreadPoolBuildError { kind: IOError }",
    ],
)
def test_every_allocator_is_understood(said: str) -> None:
    class OfALibrary(BaseException):  # as a panic in Rust is
        pass

    for error in (RuntimeError(said), OfALibrary(said)):
        assert as_bitmill_error(error).code == "out_of_memory"


@pytest.mark.parametrize(
    "said",
    ["CUBLAS_STATUS_NOT_INITIALIZED in cublasGemmEx", "CUDA error: an illegal memory access"],
)
def test_faults_of_a_device_are_not_out_of_memory(said: str) -> None:
    assert as_bitmill_error(RuntimeError(said)).code == "internal"


def test_memory_is_found_behind_the_error_that_it_led_to() -> None:
    def load() -> None:
        try:
            torch.empty(1 << 48)
        except RuntimeError as error:
            raise ValueError("the weights could not be converted") from error

    def clean() -> None:
        try:
            bytearray(1 << 60)
        finally:
            raise KeyError("left over")

    for act in (load, clean):
        with pytest.raises((ValueError, KeyError)) as raised:
            act()
        assert as_bitmill_error(raised.value).code == "out_of_memory"
    with pytest.raises(ModelError) as refused:
        try:
            bytearray(1 << 60)
        except MemoryError as error:
            raise ModelError("it has a reason of its own") from error
    assert as_bitmill_error(refused.value) is refused.value


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"), 5 << 29),
        (torch.OutOfMemoryError("Tried to allocate 20.00 MiB (GPU 0; 1.00 GiB total"), 20 << 20),
        (RuntimeError("you tried to allocate 1125899906842624 bytes. Error code 12"), 1 << 50),
        (MemoryError("Unable to allocate 8.00 PiB for an array with shape (1,)"), 1 << 53),
        (RuntimeError("CUDA error: out of memory"), None),
        (MemoryError(), None),
    ],
)
def test_what_was_asked_for_is_read_from_the_message(error: Exception, asked: int | None) -> None:
    assert asked_bytes(error) == asked


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), None),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might", 2), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
        (ImportError("libtorch.so: failed to map segment: Cannot allocate memory"), None),
        (OSError(errno.ENOSPC, "No space left on device", "/secret/path"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (OSError(errno.EFBIG, "File too large"), "disk_full"),
    ],
)
def test_what_the_machine_lacks_is_a_resource_error(error: Exception, code: str | None) -> None:
    told = as_bitmill_error(error)
    assert (type(told), told.code) == (ResourceError, code or "out_of_memory")
    assert "\n" not in told.message
    assert "/secret" not in told.message


def test_lack_is_raised_as_it_is_and_nothing_else() -> None:
    full = ResourceError("no space left", code="disk_full")
    for error, code in [(full, "disk_full"), (MemoryError(), "out_of_memory")]:
        with pytest.raises(ResourceError) as raised:
            raise_resource_error(error)
        assert raised.value.code == code
        assert raised.value.__cause__ is (None if error is full else error)
    for other in (ValueError("a bug"), ModelError("broken"), OSError(errno.EIO, "broken")):
        raise_resource_error(other)


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("shapes differ"), OSError(errno.EIO, "broken")]
)
def test_any_other_error_is_a_fault_of_the_program(error: Exception) -> None:
    told = as_bitmill_error(error)
    assert (type(told), told.code) == (ProcessFailed, "internal")
    assert type(error).__name__ in told.message
    assert as_bitmill_error(told) is told


def test_messages_are_one_line_whatever_stands_in_a_file() -> None:
    error = InputError("bad name a\x1b[2Jb\n  and\u202e more", param="p\0")
    assert error.message == str(error) == "bad name a\\x1b[2Jb and\\u202e more"
    assert error.param == "p\\x00"
    error.add("second\nline")
    assert error.message.endswith("; second line")
    assert len(InputError("x" * 10_000).message) < 2100
    assert InputError("größer – 3 µs").message == "größer – 3 µs"


def test_reasons_of_pydantic_are_the_first_problem_and_its_place() -> None:
    with pytest.raises(ValidationError) as caught:
        Budget.model_validate({"bits": "much"})
    assert reason(caught.value).startswith("bits: Input should be a valid number")
