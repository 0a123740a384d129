"""The device that a command, a call or a worker names: cpu, cuda or cuda:N. Torch-free names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from bitmill.errors import ResourceError, SpecError

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


def checked_name(name: str) -> str:
    """The name itself; raises ValueError for another one, as pydantic's validators do."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is unknown: give cpu, cuda or cuda:N")
    return name


DeviceName = Annotated[str, AfterValidator(checked_name)]


def device_of(name: str | torch.device) -> torch.device:
    """The device of this name on this machine.

    Raises SpecError for other names than cpu, cuda and cuda:N, ResourceError (`no_such_device`)
    where torch sees no such accelerator here.
    """
    import torch

    try:
        device = torch.device(checked_name(str(name)))
    except ValueError as error:
        raise SpecError(f"device: {error}", param="device") from error
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and (device.index or 0) >= there:
        built = "" if torch.version.cuda else ", which was built without CUDA,"
        raise ResourceError(
            f"device {str(device)!r}: torch {torch.__version__}{built} sees {there} accelerators "
            "here, numbered from 0; give another device, or cpu",
            code="no_such_device",
            param="device",
            hint="`bitmill doctor` says what is there.",
        )
    return device
