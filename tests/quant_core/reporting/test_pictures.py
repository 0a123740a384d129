"""The pictures of docs/allocation.md are what the code draws."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.reporting.summary import ProfileSummary

ROOT = Path(__file__).resolve().parents[3]


def test_the_pictures_are_those_that_the_code_draws() -> None:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "scripts" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = json.loads(module.NUMBERS.read_text())
    drawn = module.draw(
        ProfileSummary.model_validate(numbers["summary"]),
        BitWidthMap.model_validate(numbers["map"]),
    )
    assert len(drawn) == 3
    assert drawn == {name: (module.PICTURES / name).read_text() for name in drawn}
    page = (ROOT / "docs" / "allocation.md").read_text()
    assert set(re.findall(r"pictures/(allocation_\w+\.svg)", page)) == drawn.keys()
