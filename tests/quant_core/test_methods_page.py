"""docs/methods.md has a row for every method that toolkits of the field have, and says true."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bitmill.config.methods import METHODS
from bitmill.config.quantization import parse_config
from bitmill.config.transforms import TRANSFORMS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
LLMC = [
    *("RTN", "AWQ", "GPTQ", "SmoothQuant", "OS+", "OmniQuant", "NormTweaking", "AdaDim", "QUIK"),
    *("SpQR", "DGQ", "OWQ", "LLM.int8()", "HQQ", "QuaRot", "Magnitude", "Wanda", "ShortGPT"),
]


def rows() -> dict[str, tuple[str, str]]:
    found = re.findall(r"^\| (\S+) \| (yes|partly|no) \| (.+) \|$", PAGE, re.MULTILINE)
    return {name: (works, text) for name, works, text in found}


def test_every_name_of_the_list_has_a_row() -> None:
    assert list(rows()) == LLMC


def test_what_works_is_there_and_is_named_as_it_is_asked_for() -> None:
    known = {name.lower() for name in (*METHODS.names(), *TRANSFORMS.names())}
    works = {name.lower() for name, (how, _) in rows().items() if how == "yes"}
    allocated = {"owq"}  # outlier columns, chosen by the allocation
    assert {name for name in known if name in {one.lower() for one in LLMC}} == works - allocated
    assert set(METHODS.names()) - works == {
        "exllama"
    }  # the grid of one runtime, nowhere in that list
    for how, text in rows().values():
        method = re.search(r"--refine (\w+)", text)
        transforms = re.search(r"--transforms '(.+?)'", text)
        outliers = re.search(r"--outliers ([\d,]+)", text)
        if how == "yes":
            assert method or transforms or outliers
        if outliers:
            numbers = [int(one) for one in outliers[1].split(",")]
            parse_config({"budget": {"bits": 4.5}, "allocation": {"outliers": numbers}})
        if method:
            assert method[1] in METHODS.names()
        if transforms:
            asked = {"method": "rtn", "transforms": json.loads(transforms[1])}
            parse_config({"budget": {"bits": 4.5}, "refinement": asked})
