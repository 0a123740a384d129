"""Names of devices: what is none is refused, and so is what this machine lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitmill
from bitmill.errors import BitmillError, ResourceError, SpecError
from bitmill.inference.bench import bench
from bitmill.inference.generate import stream
from bitmill.runtime.device import device_of

ABSENT = "cuda:99"


def test_the_cpu_is_there() -> None:
    assert device_of("cpu") == device_of(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["banana", "", "meta", "mps", "cuda:", "cuda:-1", "cpu:0", "CUDA"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="give cpu, cuda or cuda:N") as caught:
        device_of(name)
    assert caught.value.param == "device"


def test_an_accelerator_that_is_not_there_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"'cuda:99': torch .* sees \d+ accelerators") as caught:
        device_of(ABSENT)
    assert (caught.value.code, caught.value.param) == ("no_such_device", "device")


CALLS: dict[str, Callable[[Path, str], object]] = {
    "quantize": lambda model, name: bitmill.quantize(
        model, bits=4, out=model.parent / "out", device=name
    ),
    "profile": lambda model, name: bitmill.profile(model, device=name),
    "evaluate": lambda model, name: bitmill.evaluate(model, model, device=name),
    "generate": lambda model, name: stream(model, "A mill", device=name),
    "bench": lambda model, name: bench(model, device=name),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "kind"), [("banana", SpecError), (ABSENT, ResourceError)])
def test_every_call_refuses_it_before_it_reads_a_model(
    tmp_path: Path, call: str, name: str, kind: type[BitmillError]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(kind) as caught:
        CALLS[call](model, name)
    assert caught.value.param == "device"
    assert list(tmp_path.iterdir()) == [model]
