"""Limits of a key as JSON gives them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from bitmill_workers.store.limits import Limits


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"queued": 0.0}, Limits(queued=0)),
        ({"bytes": 2e9}, Limits(bytes=2_000_000_000)),
        ({"priorities": [-1.0, 5]}, Limits(priorities=(-1, 5))),
    ],
    ids=str,
)
def test_a_whole_number_is_an_integer_as_the_schema_says(
    given: dict[str, Any], kept: Limits
) -> None:
    assert Limits.model_validate(given) == kept


@pytest.mark.parametrize("value", [0.5, True, "3", -1.0, float("inf")], ids=str)
def test_other_values_of_integer_limits_are_refused(value: object) -> None:
    with pytest.raises(ValidationError, match="queued"):
        Limits.model_validate({"queued": value})
    told = Limits.model_json_schema()["properties"]["queued"]["anyOf"][0]
    assert told == {"type": "integer", "minimum": 0}
