"""Names of devices: cpu, cuda or cuda:N. Whether they are there, `runtime/device.py` says."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_NAME = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


def checked_name(name: str) -> str:
    """The name itself; raises ValueError for another one, as pydantic's validators do."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is unknown: give cpu, cuda or cuda:N")
    return name


DeviceName = Annotated[str, AfterValidator(checked_name)]
