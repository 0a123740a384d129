"""The drawing of a map: every group has its band, and experts share a place."""

from __future__ import annotations

import re
import zlib
from xml.etree import ElementTree

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.reporting.charts import WIDTH_COLOURS
from bitmill.reporting.model_card import map_picture
from bitmill.reporting.picture import map_svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(linears: dict[str, str]) -> tuple[ElementTree.Element, dict[str, float]]:
    """The drawing, and how far the bands of each colour reach in all."""
    root = ElementTree.fromstring(map_svg(BitWidthMap.model_validate({"linears": linears})))
    reach = {
        path.attrib["fill"]: sum(
            float(h) for h in re.findall(r" [\d.]+h([\d.]+)v", path.attrib["d"])
        )
        for path in root.iter(f"{SVG}path")
    }
    return root, reach


def test_bands_are_as_long_as_the_share_of_groups() -> None:
    root, reach = drawn({"model.layers.0.mlp.up_proj": "2233", "model.layers.0.mlp.down_proj": "3"})
    assert set(reach) == {WIDTH_COLOURS[2], WIDTH_COLOURS[3]}
    assert reach[WIDTH_COLOURS[3]] == 3 * reach[WIDTH_COLOURS[2]]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts == ["bits of a group:", "2", "3", "up_proj", "down_proj", "0"]
    title = root.find(f"{SVG}title")
    assert title is not None
    assert title.text == "Bit-width map: 2 linears, 5 groups: 2 of 2 bits, 3 of 3 bits"


def test_dropped_groups_are_black() -> None:
    root, reach = drawn({"model.layers.0.mlp.up_proj": "2000"})
    assert reach["#000000"] == 3 * reach[WIDTH_COLOURS[2]]
    title = root.find(f"{SVG}title")
    assert title is not None
    assert title.text == "Bit-width map: 1 linears, 4 groups: 3 of 0 bits, 1 of 2 bits"


def test_experts_share_a_place_and_embeddings_have_a_row() -> None:
    experts = {f"model.layers.1.mlp.experts.{e}.up_proj": "24" for e in range(3)}
    root, reach = drawn({"model.embed_tokens": "88"} | experts)
    texts = [text.text for text in root.iter(f"{SVG}text")][4:]
    assert texts == ["model.embed_tokens", "experts.*.up_proj", "-", "1"]
    assert reach[WIDTH_COLOURS[8]] == reach[WIDTH_COLOURS[2]] + reach[WIDTH_COLOURS[4]]


def test_names_are_escaped() -> None:
    texts = [text.text for text in drawn({"a<b>&": "3"})[0].iter(f"{SVG}text")]
    assert "a<b>&" in texts


def test_the_picture_of_a_card_has_a_colour_of_its_own_for_dropped_groups() -> None:
    data = map_picture(BitWidthMap.model_validate({"linears": {"a": "02"}}))
    palette = data[data.index(b"PLTE") + 4 :]
    start = data.index(b"IDAT")
    size = int.from_bytes(data[start - 4 : start], "big")
    row = zlib.decompress(data[start + 4 : start + 4 + size])[1:]
    first, last = (palette[3 * place : 3 * place + 3] for place in (row[0], row[15]))
    assert first == bytes(3)
    assert last == bytes.fromhex(WIDTH_COLOURS[2][1:])
