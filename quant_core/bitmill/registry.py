"""Things that are found by name: those of this library, and those of installed packages.

A package adds a thing by an entry point in the registry's group, whose name is the thing's:

    [project.entry-points."bitmill.methods"]
    mine = "my_package.config:Mine"

so every process of a job finds it: the API, workers, ranks, the child that verifies. Nothing is
imported before it is asked for by name. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar

from bitmill.errors import SpecError

T = TypeVar("T")


def load_object(place: str) -> Any:
    """The object at "package.module:name" or "package.module:Class.attribute"."""
    module, _, names = place.partition(":")
    return reduce(getattr, names.split("."), import_module(module))


class Registry(Generic[T]):
    """The things of one kind by name.

    what: the kind, for messages; group: of entry points; own: places of the library's things.
    """

    def __init__(self, what: str, group: str, own: Mapping[str, str]) -> None:
        self.what, self.group, self._own = what, group, dict(own)

    def names(self) -> tuple[str, ...]:
        """All known names, the library's first."""
        return tuple(dict.fromkeys((*self._own, *sorted(self._brought()))))

    def __getitem__(self, name: str) -> T:
        """Raises SpecError, which names what is known, for an unknown name."""
        place = self._own.get(name) or self._brought().get(name)
        if place is None:
            raise SpecError(
                f"{self.what} {name!r} is unknown: known are {', '.join(self.names())}; others "
                f"come with packages that have an entry point in {self.group!r}",
                code="unknown_name",
                param=self.what,
            )
        found: T = load_object(place)
        return found

    def _brought(self) -> dict[str, str]:
        """Places of what installed packages bring. A name of the library's own stays its own."""
        return {entry.name: entry.value for entry in metadata.entry_points(group=self.group)}
