"""The device that a command, a call or a worker names, on this machine."""

from __future__ import annotations

import torch

from bitmill.config.device import checked_name
from bitmill.errors import ResourceError, SpecError


def device_of(name: str | torch.device) -> torch.device:
    """The device of this name on this machine.

    Raises SpecError for other names than cpu, cuda and cuda:N, ResourceError (`no_such_device`)
    where torch sees no such accelerator here.
    """
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
